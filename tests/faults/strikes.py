"""Runs that are killed, started again and killed again: what is the same for every command.

A `Command` is a script with a config. `whole` runs it undisturbed; `killed` runs it in lives, each
of which ends by SIGKILL at a `Moment`, and a last one that is left alone. Each has a directory of
its own for the workdir, for prepared data and for compiled programs, as these too are written in
steps that a kill can come between.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from conftest import ROOT

LIMIT = 900  # seconds of one life: a hang, and not a slow machine
POLL = 0.002  # seconds between looks at a workdir
STRUCK = Path(__file__).parent / "struck.py"


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a command runs: its workdir, and caches that none but its own lives use."""

  folder: Path

  @property
  def workdir(self) -> Path:
    return self.folder / "run"

  @property
  def touched(self) -> Path:
    """Each touch of a file, see struck.py, of the lives so far."""
    return self.folder / "touched"

  @property
  def passes(self) -> Path:
    """A line for each forward batch of evaluations, see counted.py, of the lives so far."""
    return self.folder / "passes"

  def caches(self) -> list[Path]:
    return [self.folder / "data", self.folder / "programs"]

  def passed(self) -> int:
    """Forward batches of evaluations so far."""
    return len(self.passes.read_bytes().splitlines()) if self.passes.exists() else 0

  def touches(self) -> list[str]:
    """Names of touches, each once, in order."""
    return list(dict.fromkeys(self.touched.read_text().splitlines()))


@dataclasses.dataclass(frozen=True)
class Moment:
  """When to kill: as soon as `ready`, and `delay` seconds more; or at a touch of a file.

  Attributes:
    kind: for the figures.
    ready: of a life; looked at every few milliseconds.
    delay: seconds.
    touch: name, nth and delay, see struck.py: there the life ends by itself, if it is not `ready`
      before.
  """

  kind: str
  ready: Callable[["Life"], bool]
  delay: float = 0.0
  touch: dict | None = None


NO_TOUCH = dict(name=None, nth=0, delay=0.0)


class Life:
  """One process of a command, in a group of its own."""

  def __init__(self, script: str, config: Path, place: Place, touch=None, count_passes=False):
    self.place, self._log = place, place.folder / "output"
    data, programs = place.caches()
    env = dict(
      os.environ,
      JAX_PLATFORMS="cpu",
      PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
      ROPE_JAX_DATA=str(data),
      JAX_COMPILATION_CACHE_DIR=str(programs),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",  # a start is shorter, and a kill has more
      JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES="none",  # its path would be in the keys: no copy works
    )
    command = [f"launch/{script}.py", f"--config={config}", f"--workdir={place.workdir}"]
    if touch or count_passes:
      under = [str(d) for d in (place.workdir, data, programs)]
      passes = str(place.passes) if count_passes else None
      strike = dict(touch or NO_TOUCH, under=under, log=str(place.touched), passes=passes)
      env["STRIKE"] = json.dumps(strike)
      command = [str(STRUCK), *command]
    self.began = time.monotonic()
    with open(self._log, "w") as log:
      self._process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
      )  # fmt: skip

  @property
  def seconds(self) -> float:
    return time.monotonic() - self.began

  @property
  def output(self) -> str:
    return self._log.read_text()

  def end(self, ready: Callable[["Life"], bool], delay: float = 0.0) -> str:
    """Kills it when it is `ready`; 'killed', 'struck' by itself at a touch, or 'over' before."""
    while self._process.poll() is None and not ready(self):
      if self.seconds > LIMIT:
        self._kill()
        raise AssertionError(f"no end after {LIMIT} s:\n{self.output}")
      time.sleep(POLL)
    if self._process.poll() is None:
      time.sleep(delay)
    struck = self._process.poll() == -signal.SIGKILL
    self._kill()
    code = self._process.wait()
    assert code in (0, -signal.SIGKILL), f"it ended by itself, with {code}:\n{self.output}"
    return "struck" if struck else "killed" if code else "over"

  def finished(self) -> float:
    """Waits for its end, which must be a success, and gives the seconds that it took."""
    assert self.end(lambda life: False) == "over", f"it was killed:\n{self.output}"
    return self.seconds

  def _kill(self):
    with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing of it is left
      os.killpg(self._process.pid, signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Command:
  """A script of launch/ with a config.

  Attributes:
    script: its name.
    config: the file.
    where: what a killed life was doing, for the figures.
    count_passes: whether the forward batches of evaluations are counted.
  """

  script: str
  config: Path
  where: Callable[[Life], str]
  count_passes: bool = False

  def whole(self, place: Place) -> float:
    """Runs it undisturbed, but for a list of the files that it touches; seconds."""
    place.folder.mkdir(parents=True)
    return Life(self.script, self.config, place, NO_TOUCH, self.count_passes).finished()

  def killed(self, place: Place, moments: Iterable[Moment], caches: Sequence[Path] = ()) -> dict:
    """Runs it in lives that end at these moments, and one that does not.

    Args:
      place: of these lives.
      moments: one for each life; asked for when that life begins. A life that ends before its
        moment is no kill.
      caches: copied for a start; where there are none they are made anew, between kills.

    Returns:
      Figures: kills and restarts, what was going on (`where`), and how many of each kind of moment.
    """
    place.folder.mkdir(parents=True)
    for source, copy in zip(caches, place.caches()):
      shutil.copytree(source, copy)
    kinds, where, restarts = [], [], 0
    for moment in moments:
      life = Life(self.script, self.config, place, moment.touch, self.count_passes)
      end = life.end(moment.ready, moment.delay)
      restarts += 1
      if end != "over":
        kinds.append("at_a_touch" if end == "struck" else moment.kind)
        where.append(self.where(life))
        _check_whole(place.workdir)
    Life(self.script, self.config, place, count_passes=self.count_passes).finished()
    counts = {name: found.count(name) for found in (where, kinds) for name in sorted(set(found))}
    return dict(kills=len(kinds), restarts=restarts, **counts)


def _check_whole(workdir: Path) -> None:
  """Files of JSON are whole at every moment, not only for the next life: others read them too."""
  for path in workdir.rglob("*.json"):
    if "orbax-checkpoint-tmp" not in str(path):
      json.loads(path.read_text())
