"""The runs of a claim, one after the other, each in its directory; and the record of them all."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import platform
import time
from collections.abc import Container, Sequence

import jax
from ml_collections import ConfigDict

import rope_jax
from rope_jax import config as config_lib
from rope_jax import presets, reading, validate
from rope_jax import results as results_lib
from rope_jax.claims import CLAIMS, PRESETS
from rope_jax.errors import choice
from rope_jax.search import settings
from rope_jax.weights import RUN_FILE

DIGITS = 7  # of numbers in a record: float32 has no more


def runs(claim: str, preset: str, init_from: str = "") -> dict[str, ConfigDict]:
  """The configs of a claim by name, all checked.

  Raises:
    ValueError: for a preset that there is not, or settings that do not fit.
  """
  choice("preset", preset, PRESETS)
  found = CLAIMS[claim].runs(preset, init_from)
  config_lib.runs(config_lib.comparison(**found) if found else ConfigDict(dict(order=(), runs={})))
  return found


def check(found: dict[str, ConfigDict], platform_name: str | None = None) -> None:
  """Checks every run before the first starts; factors that are still to be searched are ones.

  Raises:
    ValueError: naming the run and the key.
  """
  for name, c in found.items():
    c = c.copy_and_resolve_references()
    if _searched_by(c):
      pairs = int(c.model.head_dim * c.rope.partial_rotary_factor) // 2
      c.rope.longrope.factors = ""
      c.rope.longrope.long_factor = (c.rope.context / c.rope.original_context,) * pairs
    try:
      validate.validate(c, platform_name, inputs=platform_name is None)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error


def chosen(
  found: dict[str, ConfigDict], only: str, without: Container[str] = (), workdir: str = ""
) -> dict[str, ConfigDict]:
  """The runs whose names match a pattern, and what they start from, in order.

  Args:
    found: all runs.
    only: the pattern.
    without: runs that are done.
    workdir: where what others start from may be finished, too.

  Raises:
    ValueError: if none matches.
  """
  matching = [name for name in found if fnmatch.fnmatchcase(name, only)]
  if found and not matching:
    raise ValueError(f"--only={only}: none of {', '.join(list(found)[:5])}, ...")
  names = {name for name in matching if name not in without}
  for name in reversed(list(found)):
    if name in names:
      sources = {x for x in (_source(found[name]), _searched_by(found[name])) if x}
      # A record from elsewhere has its results, but a model to start from must be here.
      names |= {x for x in sources if not finished(x, found[x], workdir)}
  return {name: c for name, c in found.items() if name in names}


def execute(name: str, c: ConfigDict, workdir: str) -> None:
  """Searches, trains and evaluates a run in WORKDIR/NAME, or continues it there."""
  from rope_jax.search import run as search_lib  # slow to import
  from rope_jax.train import loop

  directory = os.path.join(workdir, name)
  if c.search.method:
    search_lib.search(c, directory)
  loop.train(_with_factors(name, c, workdir), directory)


def finished(name: str, c: ConfigDict, workdir: str) -> bool:
  """Whether a run of this very config has ended in WORKDIR/NAME."""
  directory = os.path.join(workdir, name)
  if not config_lib.holds_run(directory):
    return False
  if c.search.method and not os.path.exists(os.path.join(directory, settings.FACTORS)):
    return False
  if config_lib.read(directory).to_dict() != _with_factors(name, c, workdir).to_dict():
    return False
  if not set(c.evals) <= set(_results(directory)):
    return False  # they are written one by one
  return results_lib.facts(directory).get("step", 0) == c.train.steps


def record(claim: str, preset: str, found: dict[str, ConfigDict], workdir: str) -> dict:
  """What there is of a claim: results of the finished runs, and of what they are."""
  done = {}
  for name, c in found.items():
    if finished(name, c, workdir):
      directory = os.path.join(workdir, name)
      facts = reading.read_object(os.path.join(directory, RUN_FILE))
      done[name] = dict(
        config=digest(c),
        seed=c.seed,
        trained_parameters=facts.get("trained_parameters", 0),
        results=_rounded(_results(directory)),
      )
  versions = dict(rope_jax=rope_jax.__version__, jax=jax.__version__,
                  python=platform.python_version(), backend=jax.default_backend())  # fmt: skip
  return dict(claim=claim, preset=preset, of=len(found), versions=versions, runs=done)


def digest(c: ConfigDict) -> str:
  """Of all settings of a run: a record is of these and of no others."""
  text = json.dumps(c.to_dict(), sort_keys=True)
  text = text.replace(json.dumps(presets.manual())[1:-1], "manual")  # wherever Python lives
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def joined(value: dict, other: dict, found: dict[str, ConfigDict]) -> dict:
  """A record with the runs of another one, which were made elsewhere.

  Raises:
    ValueError: if that is of another claim, of other versions, or of a run of other settings.
  """
  for key in ("claim", "preset", "versions"):
    if value[key] != other.get(key):
      raise ValueError(f"--join: {key} {other.get(key)!r}, expected {value[key]!r}")
  for name, run in other["runs"].items():
    if name not in found or run["config"] != digest(found[name]):
      raise ValueError(f"--join: the run {name} is of other settings than those of this version")
  have = {**other["runs"], **value["runs"]}
  return dict(value, runs={name: have[name] for name in found if name in have})


def write_record(value: dict, path: str) -> None:
  """Writes a record, a line for each run."""
  lines = [f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in value["runs"].items()]
  head = json.dumps({k: v for k, v in value.items() if k != "runs"}, indent=1)
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  with open(path + ".tmp", "w", encoding="utf-8") as f:
    f.write(head[: head.rindex("\n}")] + ',\n "runs": {\n' + ",\n".join(lines) + "\n }\n}\n")
  os.replace(path + ".tmp", path)


def report(value: dict) -> str:
  """The tables and the verdict of a record, and what they are from."""
  text = CLAIMS[value["claim"]].report(_evaluated(value), value["preset"])
  if not value["of"]:
    return text
  v = value["versions"]
  whole = "" if len(value["runs"]) == value["of"] else f" of {value['of']}: NOT COMPLETE"
  return (
    f"{text}\n\nFrom {len(value['runs'])} runs{whole}; preset {value['preset']}, Python "
    f"{v['python']}, jax {v['jax']} on {v['backend']}."
  )


def figure(value: dict, path: str) -> bool:
  """Draws what there is to look at in a record; False where that is nothing."""
  draw = getattr(CLAIMS[value["claim"]], "figure", None)
  if draw and _evaluated(value):
    draw(_evaluated(value), value["preset"], path)
    return True
  return False


def run(
  claim: str,
  preset: str,
  workdir: str,
  only: str = "*",
  init_from: str = "",
  records: Sequence[dict] = (),
) -> dict:
  """All of a claim; continues where an earlier call was cut off.

  Args:
    claim: of `CLAIMS`.
    preset: of `PRESETS`.
    workdir: gets a directory for each run, shared between claims, and CLAIM.json.
    only: a pattern of names; runs that others start from come with them.
    init_from: the weights of the base model, for the preset 'paper'.
    records: of this claim from elsewhere: what they have is not run again.

  Returns:
    The record of all that is there, in CLAIM.json too.

  Raises:
    ValueError: for settings that do not fit.
  """
  found = runs(claim, preset, init_from)

  def current():
    value = record(claim, preset, found, workdir)
    for other in records:
      value = joined(value, other, found)
    return value

  value = current()
  left = chosen(found, only, value["runs"], workdir)
  check(left)
  path, times = os.path.join(workdir, f"{claim}.json"), []
  for i, (name, c) in enumerate(left.items()):
    rest = f", about {_minutes(times, len(left) - i)} to go" if times else ""
    print(f"\n== {name} ({i + 1} of {len(left)}{rest})", flush=True)
    before = time.monotonic()
    try:
      execute(name, c, workdir)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
    times.append(time.monotonic() - before)
    value = current()
    write_record(value, path)
  if found:
    write_record(value, path)
  return value


def _evaluated(value: dict) -> dict:
  """{run: results} of a record, without runs that others only start from."""
  return {name: run["results"] for name, run in value["runs"].items() if run["results"]}


def _results(directory: str) -> dict:
  path = os.path.join(directory, results_lib.RESULTS_FILE)
  return reading.read_object(path) if os.path.exists(path) else {}


def _with_factors(name: str, c: ConfigDict, workdir: str) -> ConfigDict:
  """The config with the factors that its search, or that of another run, has found."""
  source = _searched_by(c)
  if not source:
    return settings.searched(c, os.path.join(workdir, name))
  c = c.copy_and_resolve_references()
  c.rope.longrope.factors = os.path.abspath(os.path.join(workdir, source, settings.FACTORS))
  return c


def _source(c: ConfigDict) -> str:
  return c.init_from.removeprefix("run:") if c.init_from.startswith("run:") else ""


def _searched_by(c: ConfigDict) -> str:
  """The run whose search finds the factors of this one, or ''."""
  path = c.rope.longrope.factors
  return path.removeprefix("run:") if path.startswith("run:") else ""


def _minutes(times: list[float], count: int) -> str:
  return f"{sum(times) / len(times) * count / 60:.0f} min"


def _rounded(value):
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
