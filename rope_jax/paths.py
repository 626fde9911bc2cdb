"""Paths that people give: which files they name, and whether a directory can be there.

Only regular files are read: a device may be endless, and a pipe waits for somebody to write to it.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator

_LONGEST = 4096 - 256  # bytes of a directory's path: Linux allows 4096, with the names in it
_LONGEST_NAME = 255
_DEEPEST = 256  # directories in one another; Python makes them by recursion


def files(pattern: str) -> list[str]:
  """The regular files that a path or a glob names, sorted.

  A path that is there is taken as it is, whatever characters it has. '**' stands for any
  directories below, but hidden ones; each is visited once, so that links in a loop do no harm.
  """
  if os.path.lexists(pattern):
    found = [pattern]
  else:  # a separator at the end asks for directories
    found = [] if pattern.endswith(os.sep) else _expanded(pattern)
  return sorted({path for path in found if os.path.isfile(path)})


def below(folder: str) -> list[str]:
  """The regular files in a folder and all below it, sorted; hidden ones are left out.

  A directory that links lead to several times is visited once, and under its own name if that is
  below the folder.
  """
  paths = (os.path.join(d, name) for d in _folders(folder) for name in _visible(d))
  return sorted(path for path in paths if os.path.isfile(path))


def why_no_directory(path: str) -> str:
  """Why there is no directory at a path and none can be made, or '' if there can be one."""
  if "\0" in path:
    return "there is a NUL in it"
  if re.match(r"\w+://", path):
    return "it is a URL, not a directory; mount what is there"
  if path.startswith("~"):
    return "'~' is not the home directory here; write it out"
  at = whole = os.path.abspath(path)
  try:
    size = len(os.fsencode(at))
  except UnicodeEncodeError:
    return "it is no text"
  if size > _LONGEST or at.count(os.sep) > _DEEPEST:
    return "it is too long"
  if any(len(os.fsencode(name)) > _LONGEST_NAME for name in at.split(os.sep)):
    return "a name in it is too long"
  while True:
    try:
      mode = os.stat(at).st_mode
      break
    except FileNotFoundError:
      if os.path.islink(at):
        return f"{at!r} is a link to nowhere"
      at = os.path.dirname(at)
    except OSError as error:
      return f"{at!r}: {error.strerror}"
  if not stat.S_ISDIR(mode):
    return f"{at!r} is not a directory"
  if at != whole and not os.access(at, os.W_OK | os.X_OK):
    return f"{at!r} cannot be written to"
  return ""


def is_text(path: str) -> bool:
  """Whether a path is text as it stands, not bytes that are no UTF-8."""
  try:
    path.encode()
  except UnicodeEncodeError:
    return False
  return True


def _expanded(pattern: str) -> Iterator[str]:
  """What a glob matches. The library's own '**' goes round a loop of links forty times."""
  parts = pattern.split(os.sep)
  if "**" not in parts:
    yield from glob.glob(pattern)
    return
  at = parts.index("**")
  head, tail = os.sep.join(parts[:at]), os.sep.join(parts[at + 1 :]) or "*"
  roots = glob.glob(head) if head else [os.sep if at else os.curdir]
  for folder in (f for root in roots for f in _folders(root)):
    yield from _expanded(os.path.join(glob.escape(folder), tail))


def _folders(root: str) -> Iterator[str]:
  """A folder and the visible ones below it, each once; those that are no links come first."""
  seen, waiting = set(), [root]
  while waiting:
    links = []
    for folder in waiting:
      try:
        status = os.stat(folder)
      except OSError:
        continue
      place = status.st_dev, status.st_ino
      if not stat.S_ISDIR(status.st_mode) or place in seen:
        continue
      seen.add(place)
      yield folder
      # `waiting` grows while it is walked: all that links do not lead to, then what they lead to.
      for name in _visible(folder):
        path = os.path.join(folder, name)
        (links if os.path.islink(path) else waiting).append(path)
    waiting = links


def _visible(folder: str) -> list[str]:
  try:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
  except OSError:  # not ours to read, or gone
    return []
