"""Files that others wrote: read within bounds, and refused in one line that names them."""

from __future__ import annotations

import contextlib
import json
import os
import stat

MOST_BYTES = 64 * 2**20  # a larger file of settings is none
_DEEPEST = 60  # lists within lists; what walks them later calls itself at each level
_LONGEST = 400  # characters of an error that are not the path


def refusal(path: str, what) -> ValueError:
  """An error that begins with the path, in one line however long and strange what it quotes is."""
  path, text = str(path), str(what)
  text = text.removeprefix(f"{path}: ")
  own, text = (path, text.removeprefix(path)) if text.startswith(path) else (f"{path}: ", text)
  return ValueError(own + line(text))


def line(text: str) -> str:
  """A text in one printable line; where it is long, its beginning and its end."""
  text = str(text)
  if len(text) > _LONGEST:
    text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
  # Line breaks, escape sequences of terminals, halves of surrogate pairs.
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(items: list[str]) -> str:
  """Some of them, each in a line of bounded length."""
  shown = [item if len(item) <= 120 else f"{item[:80]} ... {item[-30:]}" for item in items[:6]]
  more = [f"and {len(items) - 6} more"] * (len(items) > 6)
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in ", ".join(shown + more))


def is_number(x) -> bool:
  """Whether a value of JSON is a number, and one that a float holds; it need not be finite."""
  return isinstance(x, float) or type(x) is int and abs(x) < 1e300


def check_plain(path: str, what: str = "cannot be read") -> None:
  """That a path is a file, or a link to one: to open a named pipe would wait for ever.

  Raises:
    ValueError: naming the path, if there is nothing or something else.
  """
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
    raise refusal(path, f"{what}: {getattr(error, 'strerror', None) or error}") from None
  if not stat.S_ISREG(mode):
    raise refusal(path, f"{what}: it is no file")


def read_text(path: str, most: int = MOST_BYTES) -> str:
  """A file of UTF-8, of at most so many bytes.

  Raises:
    ValueError: naming the path, if it cannot be read or is too large.
  """
  check_plain(path)
  try:
    if os.path.getsize(path) > most:
      raise ValueError("too large")
    with open(path, encoding="utf-8", newline="") as f:
      return f.read()
  except (OSError, ValueError) as error:
    raise refusal(path, f"cannot be read: {error}") from None


def read_json(path: str) -> object:
  """The value in a file of JSON.

  Raises:
    ValueError: naming the path, if it cannot be read, is damaged, is nested without end, or has a
      key twice: readers do not agree on which of the two holds.
  """
  text = read_text(path)
  try:
    return parse(text)
  except ValueError as error:
    raise refusal(path, f"cannot be read: {error}") from None


def read_object(path: str) -> dict:
  """The same, which must be an object."""
  value = read_json(path)
  if not isinstance(value, dict):
    raise refusal(path, "expected an object")
  return value


def parse(text: str) -> object:
  """The value of a text of JSON.

  Raises:
    ValueError: what is wrong, without the name of a file.
  """
  try:
    value = json.loads(text, object_pairs_hook=_once)
    if "\\ud" in text.lower():
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  except UnicodeEncodeError:
    raise ValueError("it has half of a surrogate pair, which is no text") from None
  level = [[value]]
  for _ in range(_DEEPEST):
    inside = (y for x in level for y in (x.values() if isinstance(x, dict) else x))
    level = [y for y in inside if isinstance(y, dict | list)]
    if not level:
      return value
  raise ValueError("it is nested too deeply")


@contextlib.contextmanager
def foreign(path: str, what: str, ours: tuple = ()):
  """Around a library that raises what it likes, panics of Rust included, because of a file.

  Args:
    path: of the file.
    what: failed.
    ours: errors that are not the library's, and pass.

  Raises:
    ValueError: naming the path and what failed.
  """
  try:
    yield
  except (KeyboardInterrupt, SystemExit, MemoryError, *ours):
    raise
  except Exception as error:
    raise refusal(path, f"{what}: {error}") from error
  except BaseException as error:
    # A panic is no Exception and has no class that could be imported.
    if type(error).__name__ != "PanicException":
      raise
    raise refusal(path, f"{what}: {error}") from error


def _once(pairs: list[tuple]) -> dict:
  out = dict(pairs)
  if len(out) != len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the key {line(twice)!r} is there twice")
  return out
