"""A watch over what a reader does: code that runs, files that it writes, time and memory."""

import faulthandler
import os
import resource
import signal
import sys
from contextlib import contextmanager

SECONDS = 60  # for a file of some hundred kilobytes, on a busy machine
_FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
              "socket.connect", "socket.getaddrinfo", "pickle.find_class")  # fmt: skip
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod",
            "shutil.rmtree")  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_state = dict(on=False, root=None, seen=[])


class Hung(BaseException):
  """Not an Exception: nothing on the way must take it for one of its own."""


def _hook(event: str, args: tuple) -> None:
  if not _state["on"]:
    return
  if event in _FORBIDDEN:
    _state["seen"].append(f"{event} {args!r:.200}")
  elif not _state["root"]:
    return
  elif event == "exec" and args[0].co_filename.startswith(_state["root"]):
    _state["seen"].append(f"exec of {args[0].co_filename}")
  elif event == "compile" and str(args[1]).startswith(_state["root"]):
    _state["seen"].append(f"compile of {args[1]}")
  elif event == "open" and args[2] is not None and args[2] & _WRITES and _elsewhere(args[0]):
    _state["seen"].append(f"open of {args[0]} for writing")
  elif event in _CHANGES and any(_elsewhere(x) for x in args[:2] if isinstance(x, str)):
    _state["seen"].append(f"{event} {args!r:.200}")


def _elsewhere(path) -> bool:
  """Outside of the case; compiled programs and modules have places of their own."""
  if not isinstance(path, str | bytes):
    return False  # a descriptor: whatever opened it was seen
  path = os.path.abspath(os.fsdecode(path))
  own = (_state["root"], os.environ.get("JAX_COMPILATION_CACHE_DIR", "/dev/null"), "/dev/null")
  return not path.startswith(own) and "__pycache__" not in path


def _alarm(*_):
  raise Hung(f"not done after {SECONDS} seconds")


_installed = []


@contextmanager
def listen(root: str = ""):
  """Yields the list of what was done that must not be.

  Args:
    root: also what is written elsewhere, and what runs of the files there, if it is given.
  """
  if not _installed:
    sys.addaudithook(_hook)  # cannot be taken away again: it is only heard here
    _installed.append(True)
  _state.update(on=True, root=root, seen=[])
  try:
    yield _state["seen"]
  finally:
    _state["on"] = False


@contextmanager
def watch(root: str):
  """Listens, and raises Hung where it takes too long.

  A hang in a library, which does not come back to Python, ends the process with a traceback.
  """
  old = signal.signal(signal.SIGALRM, _alarm)
  faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
  signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again, where a destructor did not hear it
  try:
    with listen(root) as seen:
      yield seen
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, old)


def peak_mb() -> int:
  """The most memory that this process has had, megabytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
