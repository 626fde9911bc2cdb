"""What all parts of the page are made of."""

from __future__ import annotations

from html import escape


def label(run: str) -> str:
  """The name of a run; one that is alone may have none."""
  return escape(run or "run")


def table(head: str, bodies: list[list[str]]) -> str:
  """A table of rows that are HTML already, scrolled sideways where it is too wide."""
  inside = "".join(f"<tbody>\n{chr(10).join(rows)}\n</tbody>" for rows in bodies)
  return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{inside}</table></div>'
