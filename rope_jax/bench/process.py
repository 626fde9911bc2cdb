"""Measurements in processes of their own, and the file that keeps them."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

from rope_jax import bench, reading, weights
from rope_jax.bench import machine

FILE = "bench.json"

# How a process says that there was not enough memory, if the system let it say anything.
_NO_MEMORY = (
  "RESOURCE_EXHAUSTED", "not enough memory", "can't allocate memory", "MemoryError", "bad_alloc",
)  # fmt: skip
_ENVIRONMENT = dict(
  JAX_PLATFORMS="cpu",  # where PyTorch is, too
  HF_HUB_OFFLINE="1",
  TRANSFORMERS_VERBOSITY="error",
)


def check(settings: bench.Settings) -> None:
  """Whether all that is measured is installed.

  Raises:
    ValueError: naming the flag, and how to install it.
  """
  if settings.peer:
    try:
      machine.versions("peer")
    except metadata.PackageNotFoundError as error:
      raise ValueError(
        f"--peer=True: {error.name} is not installed; pip install -e '.[peer]', or --nopeer for "
        "ours alone"
      ) from None
  if settings.model == "smollm2":
    try:
      weights.locate("smollm2-135m")
    except ValueError as error:
      raise ValueError(f"--model=smollm2: {error}") from None


def run(spec: dict) -> dict:
  """The result of a specification; {'failed': why} if the memory did not suffice.

  Raises:
    RuntimeError: if the process failed in another way.
  """
  if spec["part"] != "compile":
    return _worker(spec)
  with tempfile.TemporaryDirectory() as cache:
    environment = dict(
      JAX_COMPILATION_CACHE_DIR=cache,
      JAX_ENABLE_COMPILATION_CACHE="true",
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    return {state: _worker(spec, environment) for state in ("empty", "filled")}


def _worker(spec: dict, environment: dict | None = None) -> dict:
  done = subprocess.run(
    [sys.executable, "-m", "rope_jax.bench.worker", json.dumps(spec)],
    env={**os.environ, **_ENVIRONMENT, **(environment or {})},
    capture_output=True,
    text=True,
  )
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  if done.returncode == -9 or any(text in done.stderr for text in _NO_MEMORY):
    return dict(failed="out of memory")
  raise RuntimeError(
    f"measurement {json.dumps(spec)} failed with status {done.returncode}:\n{done.stderr[-3000:]}"
  )


class Journal:
  """All measurements of a workdir, on disk as soon as they are made.

  Those of another machine or of other versions stay in the file and are not found.

  Raises:
    ValueError: if the workdir holds another kind of file.
  """

  def __init__(self, workdir: str, peer: bool):
    self.path = os.path.join(workdir, FILE)
    self.machine = machine.machine()
    sides = bench.SIDES if peer else bench.SIDES[:1]
    self.versions = {side: machine.versions(side) for side in sides}
    self.rows: list[dict] = []
    if os.path.exists(self.path):
      try:
        self.rows = reading.read_object(self.path)["measurements"]
        for row in self.rows:
          _ = [row[key] for key in ("spec", "machine", "versions", "repeat")]
      except (ValueError, KeyError, TypeError):
        raise ValueError(f"--workdir={workdir}: {FILE} holds no measurements") from None

  def find(self, spec: dict) -> list[dict]:
    """The rows of a specification on this machine with these versions, by repeat."""
    facts = dict(spec=spec, machine=self.machine, versions=self.versions.get(spec["side"]))
    rows = [row for row in self.rows if all(row[k] == v for k, v in facts.items())]
    return sorted(rows, key=lambda row: row["repeat"])

  def has(self, spec: dict, repeat: int) -> bool:
    return any(row["repeat"] == repeat for row in self.find(spec))

  def add(self, spec: dict, repeat: int, result: dict) -> None:
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = dict(machine=self.machine, versions=self.versions[spec["side"]], date=date)
    self._write([*self.rows, dict(spec=spec, repeat=repeat, result=result, **facts)])

  def forget(self, planned: list[tuple[dict, int]]) -> None:
    """Takes out what is about to be measured again."""
    old = [row for spec, repeat in planned for row in self.find(spec) if row["repeat"] == repeat]
    gone = set(map(id, old))
    self._write([row for row in self.rows if id(row) not in gone])

  def _write(self, rows: list[dict]) -> None:
    self.rows = rows
    os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
    with open(self.path + ".tmp", "w") as f:
      json.dump(dict(measurements=rows), f, indent=1)
    os.replace(self.path + ".tmp", self.path)  # whole at every moment


def measure(
  planned: list[tuple[dict, int]], journal: Journal, *, runner: Callable[[dict], dict] = run
) -> None:
  """Makes the planned measurements that the journal has not, with a line for each."""
  missing = [(spec, repeat) for spec, repeat in planned if not journal.has(spec, repeat)]
  if len(missing) < len(planned):
    print(f"{len(planned) - len(missing)} of {len(planned)} measurements are there already")
  began = time.monotonic()
  for number, (spec, repeat) in enumerate(missing, 1):
    print(f"[{number}/{len(missing)}] {describe(spec)}", end=": ", flush=True)
    result = runner(spec)
    journal.add(spec, repeat, result)
    print(f"{_shown(result)} ({_clock(time.monotonic() - began)} elapsed)", flush=True)


def describe(spec: dict) -> str:
  """A specification in words."""
  words = [spec["part"], spec.get("what", ""), spec.get("dtype", "")]
  words += [f"{spec['length']:,} tokens"] if "length" in spec else []
  words += [f"batch {spec['batch']}"] if "batch" in spec else []
  return ", ".join(filter(None, [*words, spec["side"]]))


def _shown(result: dict) -> str:
  if "failed" in result:
    return result["failed"]
  return f"{min(result['seconds']):.3g} s" if "seconds" in result else "done"


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes}:{seconds:02}"
