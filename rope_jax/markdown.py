"""Tables in Markdown that are as good to read on a screen."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table whose first column is set left and the others right."""
  cells = [list(header), *map(list, rows)]
  if len({len(row) for row in cells}) != 1:
    raise ValueError(f"rows of {sorted({len(row) for row in cells})} cells")
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

  def line(row):
    first, *others = zip(row, widths)
    return "| " + " | ".join([first[0].ljust(first[1]), *(x.rjust(w) for x, w in others)]) + " |"

  rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
  return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
