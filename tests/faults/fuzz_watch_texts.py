"""What hostile text must not do: connect, start a program, load a pickle, write elsewhere."""

import contextlib
import hashlib
import os
import sys

EVENTS = ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "subprocess.Popen",
          "os.system", "os.exec", "os.posix_spawn")  # fmt: skip
_active: list[list[str]] = []  # audit hooks stay: this one is only heard while somebody watches


def _hook(event: str, arguments) -> None:
  if _active and event in EVENTS:
    _active[-1].append(f"{event} {arguments!r:.200}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched():
  """Fails if anything of `EVENTS` happens."""
  _active.append([])
  try:
    yield
  finally:
    seen = _active.pop()
  assert not seen, seen


def snapshot(root: str) -> dict:
  """What is below a directory: path -> kind, size and content of files."""
  out = {}
  for directory, folders, files in os.walk(root):
    for name in [*folders, *files]:
      path = os.path.join(directory, name)
      status, content = os.lstat(path), ""
      if os.path.isfile(path) and not os.path.islink(path):
        with open(path, "rb") as f:
          content = hashlib.file_digest(f, "sha256").hexdigest()
      out[path] = status.st_mode, content
  return out


def one_line(error: ValueError, key: str) -> None:
  """Fails unless an error is a line that a person can use, with the key."""
  text = str(error)
  assert text and "\n" not in text and "Traceback" not in text, text
  assert key in text, f"{key} is not in: {text}"
