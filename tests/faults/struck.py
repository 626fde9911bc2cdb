"""A command that dies at a chosen touch of the file system, to hit moments that no clock can.

  STRIKE='{...}' python tests/faults/struck.py launch/train.py --config=FILE --workdir=DIR

runs the command as it is, but for an audit hook (`sys.addaudithook`). Python tells the hook of each
file that it is about to open for writing, rename, make or remove; what that is gets a name in which
what differs from run to run is left out, see `name`. STRIKE is JSON:

  under   directories; what is touched elsewhere does not count
  log     a file that gets the name of each touch, a line each, in order; or null
  name    the touch to die at, or null
  nth     which of those of that name, from 1
  delay   seconds after it: 0 is before the file is touched, a little later is inside of it
  passes  a file that gets a line for each forward batch of an evaluation, see counted.py; or null

What is written in C++ (the arrays of a checkpoint) is not seen here: for that there are delays.
"""

import json
import os
import re
import runpy
import signal
import sys
import threading
import time

import counted

# Audit event -> what it does. os.replace is told as os.rename.
TOUCHES = {"os.rename": "rename", "os.mkdir": "make", "os.remove": "remove", "os.rmdir": "remove"}


def name(event: str, path: str, under: list[str]) -> str:
  """What a touch is called in every run: 'rename workdir/run.json.tmp', say."""
  root = next(d for d in under if path.startswith(d))
  short = os.path.basename(root) + path[len(root) :]
  short = re.sub(r"\b[0-9a-f]{16,}\b", "HASH", short)
  short = re.sub(r"tmp[0-9a-z_]{8}\b", "TMP", short)
  found = f"{event} {re.sub('[0-9]+', 'N', short)}"
  # All that goes with an old checkpoint is one moment, not the most of them.
  return re.sub("^(remove .*/checkpoints/N)/.*", r"\1/INSIDE", found)


def _touch(event: str, args: tuple) -> tuple[str, str] | None:
  """(what happens, the path) of an audit event, or None if nothing is changed by it."""
  path = args[0] if args else None
  if not isinstance(path, str | bytes | os.PathLike):
    return None
  path = os.fsdecode(path)
  if event in TOUCHES:
    if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # shutil.rmtree is inside a directory
      path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
    return TOUCHES[event], os.path.abspath(path)
  if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
    return "open", os.path.abspath(path)
  return None


def _die(delay: float) -> None:
  time.sleep(delay)
  os.kill(os.getpid(), signal.SIGKILL)


def arm(under: list[str], log: str | None, wanted: str | None, nth: int, delay: float) -> None:
  """Sets the hook; the arguments are those of STRIKE."""
  lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
  seen = 0

  def hook(event, args):
    nonlocal seen
    touch = _touch(event, args)
    if touch is None or not touch[1].startswith(tuple(under)):
      return
    found = name(*touch, under)
    if lines is not None:
      os.write(lines, f"{found}\n".encode())
    if found != wanted:
      return
    seen += 1
    if seen == nth:
      if not delay:
        _die(0)
      threading.Thread(target=_die, args=(delay,), daemon=True).start()

  sys.addaudithook(hook)


def main():
  strike = json.loads(os.environ["STRIKE"])
  if strike["passes"]:
    counted.install(strike["passes"])
  arm(strike["under"], strike["log"], strike["name"], strike["nth"], strike["delay"])
  sys.argv = sys.argv[1:]
  sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
  runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
  main()
