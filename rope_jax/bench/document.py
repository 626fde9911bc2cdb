"""The part of a markdown file that the tables replace."""

from __future__ import annotations

FIRST, LAST = "<!-- bench -->", "<!-- /bench -->"


def check(path: str) -> None:
  """Raises ValueError for --output unless the file has both marks, each in a line, in order."""
  _split(path)


def replace(path: str, text: str) -> None:
  """Puts the text between the marks, instead of what stands there."""
  before, after = _split(path)
  with open(path, "w") as f:
    f.write("\n".join([*before, "", *text.splitlines(), "", *after, ""]))


def _split(path: str) -> tuple[list[str], list[str]]:
  """The lines up to the first mark and those from the last on, marks included."""
  try:
    with open(path) as f:
      lines = f.read().splitlines()
  except OSError as error:
    raise ValueError(f"--output={path}: {error.strerror}") from None
  places = [[i for i, line in enumerate(lines) if line.strip() == mark] for mark in (FIRST, LAST)]
  if [len(p) for p in places] != [1, 1] or places[0] > places[1]:
    raise ValueError(f"--output={path}: expected one line {FIRST} and, after it, one {LAST}")
  return lines[: places[0][0] + 1], lines[places[1][0] :]
