"""What hostile text must not do: connect, start a program, load a pickle, write elsewhere."""

import contextlib
import hashlib
import os

import fuzz_watch


@contextlib.contextmanager
def watched():
  """Fails if anything happens that reading must never do."""
  with fuzz_watch.listen() as seen:
    yield
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
