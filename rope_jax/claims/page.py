"""A Markdown page with the tables of stored records, each between two comments.

<!-- psc-table: results/psc-table.json -->
...
<!-- end of psc-table -->
"""

from __future__ import annotations

import os
import re

from rope_jax.claims import CLAIMS, record

_SECTION = re.compile(r"(<!-- ([\w-]+): ([\w./-]*) -->\n).*?(<!-- end of \2 -->)", re.S)
_START = re.compile(r"^<!-- ([\w-]+): [\w./-]* -->$", re.M)
_END = re.compile(r"^<!-- end of ([\w-]+) -->$", re.M)


def rendered(path: str) -> str:
  """The text of a page with its tables made anew.

  Raises:
    ValueError: if there is no page, or a section of it has no end, no such claim or no such record.
  """

  def section(match):
    start, claim, name, end = match.groups()
    if claim not in CLAIMS:
      raise ValueError(f"--page={path}: a section of {claim!r}, which is no claim")
    if name:
      value = record.read(os.path.join(os.path.dirname(path), name))
    else:  # a claim that needs no runs
      value = dict(claim=claim, preset="mini", of=0, runs={})
    return f"{start}\n{record.report(value)}\n\n{end}"

  try:
    with open(path, encoding="utf-8") as f:
      text = f.read()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"--page={path}: {error}") from error
  sections = [match[2] for match in _SECTION.finditer(text)]
  if sections != _START.findall(text) or sections != _END.findall(text):
    raise ValueError(f"--page={path}: a section without its end, or an end without its section")
  return _SECTION.sub(section, text)


def write(path: str) -> None:
  """Makes the tables of a page anew."""
  text = rendered(path)
  with open(path + ".tmp", "w", encoding="utf-8") as f:
    f.write(text)
  os.replace(path + ".tmp", path)
