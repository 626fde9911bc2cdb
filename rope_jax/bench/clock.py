"""Seconds and bytes of this process."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable

_RUNS, _ENOUGH = 5, 2.0  # short runs are repeated, as long as they take no more seconds together


def timed(run: Callable[[], object], warm_up: Callable[[], object] | None = None) -> list[float]:
  """Seconds of each run, after `warm_up`, or one run that counts for nothing.

  Args:
    run: waits for its result.
    warm_up: for long runs, less of the same.
  """
  (warm_up or run)()
  seconds: list[float] = []
  while not seconds or len(seconds) < _RUNS and sum(seconds) < _ENOUGH:
    began = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - began)
  return seconds


def peak_bytes() -> int:
  """The most memory that this process has occupied."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start() -> dict:
  """The bytes occupied when the work starts. Linux then forgets the peak of loading weights.

  Where it cannot be forgotten it counts: a later peak that is no higher is that of loading.
  """
  with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
    f.write("5")
  return dict(start_bytes=peak_bytes())
