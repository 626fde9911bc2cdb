"""A Markdown page with the tables of stored records, each between two comments.

<!-- psc-table: results/psc-table.json -->
...
<!-- end of psc-table -->
"""

from __future__ import annotations

import os
import re

from rope_jax import reading
from rope_jax.claims import CLAIMS, runner

_SECTION = re.compile(r"(<!-- ([\w-]+): ([\w./-]*) -->\n).*?(<!-- end of \2 -->)", re.S)


def read(path: str, flag: str = "record") -> dict:
  """A record of `runner.write_record`, named by a flag.

  Raises:
    ValueError: if it is none, naming the file.
  """
  try:
    value = reading.read_object(path)
  except ValueError as error:
    raise ValueError(f"--{flag}: {error}") from error
  if value.get("claim") not in CLAIMS or not isinstance(value.get("runs"), dict):
    raise ValueError(f"--{flag}={path}: no record of a claim, as launch/reproduce.py writes them")
  return value


def rendered(path: str) -> str:
  """The text of a page with its tables made anew.

  Raises:
    ValueError: if the page has a section of a claim or record that there is not.
  """

  def section(match):
    start, claim, name, end = match.groups()
    if claim not in CLAIMS:
      raise ValueError(f"--page={path}: a section of {claim!r}, which is no claim")
    if name:
      value = read(os.path.join(os.path.dirname(path), name))
    else:  # a claim that needs no runs
      value = dict(claim=claim, preset="mini", of=0, runs={})
    return f"{start}\n{runner.report(value)}\n\n{end}"

  with open(path, encoding="utf-8") as f:
    return _SECTION.sub(section, f.read())


def write(path: str) -> None:
  """Makes the tables of a page anew."""
  text = rendered(path)
  with open(path + ".tmp", "w", encoding="utf-8") as f:
    f.write(text)
  os.replace(path + ".tmp", path)
