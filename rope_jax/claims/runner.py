"""The runs of a claim, one after the other, each in its directory."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import time
from collections.abc import Container, Sequence

from ml_collections import ConfigDict

from rope_jax import config as config_lib
from rope_jax import validate
from rope_jax.claims import CLAIMS, PRESETS, record
from rope_jax.errors import choice
from rope_jax.search import settings
from rope_jax.train import multihost, state


def runs(claim: str, preset: str, init_from: str = "") -> dict[str, ConfigDict]:
  """The configs of a claim by name, each after those that it starts from.

  Args:
    claim: of `CLAIMS`.
    preset: of `PRESETS`.
    init_from: the weights of the base model; '' for those of the preset.

  Raises:
    ValueError: for a preset that there is not, or weights that no run of the claim starts from.
  """
  choice("preset", preset, PRESETS)
  found = CLAIMS[claim].runs(preset, init_from)
  if init_from and (preset == "mini" or _same(found, CLAIMS[claim].runs(preset, ""))):
    raise ValueError(f"--init_from={init_from}: {claim}, preset {preset}, has its own weights")
  config_lib.runs(config_lib.comparison(**found) if found else ConfigDict(dict(order=(), runs={})))
  return found


def check(
  left: dict[str, ConfigDict], found: dict[str, ConfigDict], platform_name: str | None = None
) -> None:
  """Checks every run before the first starts; factors that are still to be searched are ones.

  Args:
    left: those to check.
    found: all of the claim, with what they start from.
    platform_name: for which, without weights or text; if None, for what this process runs on.

  Raises:
    ValueError: naming the run and the key.
  """
  for name, c in left.items():
    c = c.copy_and_resolve_references()
    if record.searched_by(c):
      pairs = int(c.model.head_dim * c.rope.partial_rotary_factor) // 2
      c.rope.longrope.factors = ""
      c.rope.longrope.long_factor = (c.rope.context / c.rope.original_context,) * pairs
    try:
      validate.validate(c, platform_name, inputs=platform_name is None)
      if c.init_from.startswith("run:"):
        state.check_source(c, found[c.init_from.removeprefix("run:")])
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
  if only != "*" and not matching:
    raise ValueError(
      f"--only={only}: none of the runs, {', '.join([*found][:5]) or 'which it has none of'} ..."
    )
  names = {name for name in matching if name not in without}
  for name in reversed(list(found)):
    if name in names:
      # A record from elsewhere has its results, but a model to start from must be here.
      names |= {x for x in record.sources(found[name]) if not record.finished(x, found, workdir)}
  return {name: c for name, c in found.items() if name in names}


def execute(name: str, found: dict[str, ConfigDict], workdir: str) -> None:
  """Searches, trains and evaluates a run in WORKDIR/NAME, or continues it there."""
  from rope_jax.search import run as search_lib  # slow to import
  from rope_jax.train import loop

  c, directory = found[name], os.path.join(workdir, name)
  if c.search.method:
    search_lib.search(c, directory)
  c = _with_factors(name, c, workdir)
  results = loop.train(c, directory)
  if multihost.is_main():
    record.mark(name, found, workdir, results)
  multihost.wait("a run of a claim")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is left to make of a claim.

  Attributes:
    claim, preset, workdir: as given to `plan`.
    found: all runs of the claim, {name: config}.
    left: names of those to make, in order.
    records: of this claim from elsewhere.
  """

  claim: str
  preset: str
  workdir: str
  found: dict[str, ConfigDict]
  left: tuple[str, ...]
  records: Sequence[dict]

  def record(self) -> dict:
    """What there is of the claim so far."""
    value = record.collect(self.claim, self.preset, self.found, self.workdir)
    for other in self.records:
      value = record.join(value, other, self.found)
    return value


def plan(
  claim: str,
  preset: str,
  workdir: str,
  only: str = "*",
  init_from: str = "",
  records: Sequence[dict] = (),
) -> Plan:
  """The runs of a claim that are left to make, all checked.

  Args:
    claim: of `CLAIMS`.
    preset: of `PRESETS`.
    workdir: gets a directory for each run, shared between claims, and CLAIM.json.
    only: a pattern of names; runs that others start from come with them.
    init_from: the weights of the base model, for the preset 'paper'.
    records: of this claim from elsewhere: what they have is not run again.

  Raises:
    ValueError: for settings that do not fit, or a record of other ones.
  """
  found = runs(claim, preset, init_from)
  there = Plan(claim, preset, workdir, found, (), records).record()["runs"]
  left = chosen(found, only, there, workdir)
  check(left, found)
  return Plan(claim, preset, workdir, found, tuple(left), records)


def run(p: Plan) -> dict:
  """Makes what is left of a claim; a plan made anew continues where this was cut off.

  Returns:
    The record of all that is there, in CLAIM.json too.
  """
  path, times = os.path.join(p.workdir, f"{p.claim}.json"), []
  for i, name in enumerate(p.left):
    if record.finished(name, p.found, p.workdir):
      continue  # by another claim since
    rest = f", about {_minutes(times, len(p.left) - i)} to go" if times else ""
    if multihost.is_main():
      print(f"\n== {name} ({i + 1} of {len(p.left)}{rest})", flush=True)
    before = time.monotonic()
    try:
      execute(name, p.found, p.workdir)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
    times.append(time.monotonic() - before)
    if multihost.is_main():
      record.write(p.record(), path)
  value = p.record()
  if p.found and multihost.is_main():
    record.write(value, path)
  return value


def _same(some: dict[str, ConfigDict], others: dict[str, ConfigDict]) -> bool:
  return [c.to_dict() for c in some.values()] == [c.to_dict() for c in others.values()]


def _with_factors(name: str, c: ConfigDict, workdir: str) -> ConfigDict:
  """The config with the factors that its search, or that of another run, has found."""
  source = record.searched_by(c)
  if not source:
    return settings.searched(c, os.path.join(workdir, name))
  c = c.copy_and_resolve_references()
  c.rope.longrope.factors = os.path.abspath(os.path.join(workdir, source, settings.FACTORS))
  return c


def _minutes(times: list[float], count: int) -> str:
  return f"{sum(times) / len(times) * count / 60:.0f} min"
