"""Preemption: a notice (SIGTERM) ends a process with all that it has done, under a code of its own.

One process leaves at once, within a second, wherever nothing would be lost: what it has done so far
is on the disk. Within `deferred`, where something would be, the notice waits for `check`, and what
is to be saved is saved first. Several processes leave together: jax's own service (SIGTERM, as TPUs
get it before maintenance) tells all which step is the one to stop at.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading

import jax

from rope_jax.errors import Preempted

_requested = threading.Event()
_deferring = threading.Event()
_calls = itertools.count(1)


def install() -> None:
  """Makes SIGTERM the notice for a process that is alone; to be called in its main thread.

  Python's own handlers run only between two of its instructions: a compilation of a minute, which
  is none, would keep the notice waiting. So a thread reads it.
  """
  if jax.process_count() > 1:
    return  # jax has taken it
  notices, notice = os.pipe()
  os.set_blocking(notice, False)
  signal.signal(signal.SIGTERM, lambda *_: None)  # so that it does not just end the process
  signal.set_wakeup_fd(notice, warn_on_full_buffer=False)

  def watch():
    while number := os.read(notices, 1):
      if number[0] == signal.SIGTERM:
        _requested.set()
        if not _deferring.is_set():
          _leave("preempted: what was done is kept; the same command goes on")

  threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def deferred():
  """Within it, a notice ends the process at `check` only."""
  _deferring.set()
  try:
    yield
  finally:
    _deferring.clear()
  if _requested.is_set():  # since the last check
    raise Preempted("the same command goes on")


def check(together: bool = True) -> None:
  """Raises Preempted if the notice has come: what there is to save is to be saved now.

  Args:
    together: whether all processes are here, as they are to stop at the same call; where they are
      not, several processes are not stopped.
  """
  if jax.process_count() == 1:
    come = _requested.is_set()
  else:
    from jax.experimental import multihost_utils

    # jax stops all at the call after the last that any has made: so one count for all calls.
    come = together and multihost_utils.reached_preemption_sync_point(next(_calls))
  if come:
    raise Preempted("the same command goes on")


def _leave(text: str) -> None:
  """Ends the process from any thread, wherever the main one is, and whoever has gone away."""
  with contextlib.suppress(OSError):
    os.write(2, f"\n{text}\n".encode())
  os._exit(Preempted.EXIT_CODE)
