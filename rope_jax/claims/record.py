"""The record of a claim: what its runs were, and what came out; and the tables made of it.

A run that has ended leaves WORKDIR/NAME/done.json: the digest of its settings, what it was run by,
and its results, which a later evaluation does not change. What is there without it, or with another
digest, is no part of a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform

import jax
from ml_collections import ConfigDict

import rope_jax
from rope_jax import config as config_lib
from rope_jax import presets, reading
from rope_jax.claims import CLAIMS, PRESETS
from rope_jax.weights import RUN_FILE

DIGITS = 7  # of numbers in a record: float32 has no more
DONE = "done.json"
_RUN = {"config", "seed", "trained_parameters", "results"}


def mark(name: str, found: dict[str, ConfigDict], workdir: str, results: dict) -> None:
  """Says in WORKDIR/NAME that the run has ended, with the results {evaluation: {column: ...}}."""
  directory = os.path.join(workdir, name)
  facts = reading.read_object(os.path.join(directory, RUN_FILE))
  run = dict(
    config=digest(name, found),
    seed=found[name].seed,
    trained_parameters=facts.get("trained_parameters", 0),
    results=_rounded(results),
  )
  config_lib.write_json(os.path.join(directory, DONE), dict(run=run, versions=_versions()))


def finished(name: str, found: dict[str, ConfigDict], workdir: str) -> bool:
  """Whether a run of these very settings has ended in WORKDIR/NAME; as for `ended`."""
  return ended(name, found, workdir) is not None


def ended(name: str, found: dict[str, ConfigDict], workdir: str) -> dict | None:
  """A run of these very settings as it is in a record; None if none has ended in WORKDIR/NAME.

  Raises:
    ValueError: if other versions of Python, jax or this package have run it, or it is damaged.
  """
  path = os.path.join(workdir, name, DONE)
  if not os.path.exists(path):
    return None
  done = reading.read_object(path)
  if not isinstance(done.get("run"), dict) or not set(done["run"]) >= _RUN:
    raise ValueError(f"--workdir: {path} is damaged: delete it, and the run is looked at again")
  if done["run"]["config"] != digest(name, found):
    return None
  if done.get("versions") != _versions():
    there, by = os.path.join(workdir, name), _named(done.get("versions", {}))
    raise ValueError(f"--workdir: {there} was run by {by}, and this is {_named(_versions())}")
  return done["run"]


def collect(claim: str, preset: str, found: dict[str, ConfigDict], workdir: str) -> dict:
  """What there is of a claim: results of the finished runs, and of what they are."""
  done = {name: ended(name, found, workdir) for name in found}
  done = {name: run for name, run in done.items() if run}
  return dict(claim=claim, preset=preset, of=len(found), versions=_versions(), runs=done)


def digest(name: str, found: dict[str, ConfigDict]) -> str:
  """Of all settings of a run and of those it starts from: a record is of these and of no others.

  Where weights lie is left out, since machines keep them in different places: that they are the
  same is for whoever names them.
  """
  settings = found[name].to_dict()
  if not settings["init_from"].startswith("run:"):
    settings["init_from"] = bool(settings["init_from"])
  text = json.dumps(settings, sort_keys=True)
  text = text.replace(json.dumps(presets.manual())[1:-1], "manual")  # wherever Python lives
  text += "".join(digest(source, found) for source in sources(found[name]))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def join(value: dict, other: dict, found: dict[str, ConfigDict]) -> dict:
  """A record with the runs of another one, which were made elsewhere.

  Raises:
    ValueError: if that is of another claim, of other versions, or of a run of other settings.
  """
  for key in ("claim", "preset", "versions"):
    if value[key] != other.get(key):
      raise ValueError(f"--join: {key} {other.get(key)!r}, expected {value[key]!r}")
  for name, run in other["runs"].items():
    if name not in found or run["config"] != digest(name, found):
      raise ValueError(f"--join: the run {name} is of other settings than those of this version")
  have = {**other["runs"], **value["runs"]}
  return dict(value, runs={name: have[name] for name in found if name in have})


def write(value: dict, path: str) -> None:
  """Writes a record, a line for each run."""
  lines = [f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in value["runs"].items()]
  head = json.dumps({k: v for k, v in value.items() if k != "runs"}, indent=1)
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  own = f"{path}.{os.getpid()}.tmp"  # several processes may write the record of a workdir
  with open(own, "w", encoding="utf-8") as f:
    f.write(head[: head.rindex("\n}")] + ',\n "runs": {\n' + ",\n".join(lines) + "\n }\n}\n")
  os.replace(own, path)


def read(path: str, flag: str = "record") -> dict:
  """A record that `write` has written, named by a flag.

  Raises:
    ValueError: if it is none, naming the file.
  """
  try:
    value = reading.read_object(path)
  except ValueError as error:
    raise ValueError(f"--{flag}: {error}") from error
  kinds = dict(claim=str, preset=str, of=int, versions=dict, runs=dict)
  good = all(isinstance(value.get(key), kind) for key, kind in kinds.items())
  if good and value["claim"] in CLAIMS and value["preset"] in PRESETS:
    good = all(isinstance(run, dict) and set(run) >= _RUN for run in value["runs"].values())
    if good:
      return value
  raise ValueError(f"--{flag}={path}: no record of a claim, as launch/reproduce.py writes them")


def report(value: dict) -> str:
  """The tables and the verdict of a record, and what they are from."""
  text = CLAIMS[value["claim"]].report(_evaluated(value), value["preset"])
  if not value["of"]:
    return text
  v = value["versions"]
  whole = "" if len(value["runs"]) == value["of"] else f" of {value['of']}: NOT COMPLETE"
  return f"{text}\n\nFrom {len(value['runs'])} runs{whole}; preset {value['preset']}, {_named(v)}."


def figure(value: dict, path: str) -> bool:
  """Draws what there is to look at in a record; False where that is nothing."""
  draw = getattr(CLAIMS[value["claim"]], "figure", None)
  return bool(draw and draw(_evaluated(value), value["preset"], path))


def sources(c: ConfigDict) -> list[str]:
  """The runs that a run starts from: the model, and the factors."""
  model = c.init_from.removeprefix("run:") if c.init_from.startswith("run:") else ""
  return [name for name in (model, searched_by(c)) if name]


def searched_by(c: ConfigDict) -> str:
  """The run whose search finds the factors of this one, or ''."""
  path = c.rope.longrope.factors
  return path.removeprefix("run:") if path.startswith("run:") else ""


def _evaluated(value: dict) -> dict:
  """{run: results} of a record, without runs that others only start from."""
  return {name: run["results"] for name, run in value["runs"].items() if run["results"]}


def _versions() -> dict[str, str]:
  return dict(rope_jax=rope_jax.__version__, jax=jax.__version__,
              python=platform.python_version(), backend=jax.default_backend())  # fmt: skip


def _named(v: dict[str, str]) -> str:
  return f"Python {v.get('python')}, jax {v.get('jax')} on {v.get('backend')}"


def _rounded(value):
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
