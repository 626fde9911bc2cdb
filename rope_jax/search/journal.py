"""What a search has computed, line by line: a search that is started again reads it, not the model.

A search is a function of its options and of the numbers that it asks for. So all that must be kept
of one that was cut off, anywhere, is those numbers in their order: the same search asks for the
same ones again, and gets them from here until the file ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import numpy as np


class Journal:
  """Questions and answers in a file of JSON lines.

  Args:
    path: of the file; one that is there is continued.
    settings: of the search, plain data; the first line.
    writes: whether this process, of several that all compute the same, writes.

  Raises:
    ValueError: if the file is of a search with other settings, naming them.
  """

  def __init__(self, path: str, settings: dict, writes: bool = True):
    self.path, self._writes = path, writes
    self._known = _lines(path)
    self._next = 1
    settings = json.loads(json.dumps(settings))
    if not self._known:
      self._append(settings, "w")
      return
    changed = [f"{k}={settings.get(k)!r} (was {self._known[0].get(k)!r})"
               for k in sorted(settings | self._known[0])
               if settings.get(k) != self._known[0].get(k)]  # fmt: skip
    if changed:
      raise ValueError(
        f"{path} holds a search with other settings; choose another --workdir, or set back: "
        + ", ".join(changed)
      )
    if writes:  # what is left of a line that was being written is gone
      whole = "".join(json.dumps(line) + "\n" for line in self._known)
      with open(path + ".tmp", "w") as f:
        f.write(whole)
      os.replace(path + ".tmp", path)

  @property
  def replays(self) -> bool:
    """Whether the next answer is known."""
    return self._next < len(self._known)

  def peek(self) -> dict:
    """The next line, where `replays`."""
    return self._known[self._next]

  def ask(self, question: dict, answer: Callable[[], list]) -> list:
    """The answer in the file, or else the one that is computed now, and kept.

    Args:
      question: plain data, with numbers that are compared to 1e-6.
      answer: computes the answer, plain data.

    Raises:
      ValueError: if the file has another question here.
    """
    if self.replays:
      line = self._known[self._next]
      if not _same(line["question"], question):
        raise ValueError(
          f"{self.path}, line {self._next + 1}: another search than this one: it was made by other "
          "code or on another kind of machine; choose another --workdir"
        )
      self._next += 1
      return line["answer"]
    found = answer()
    self._append(dict(question=question, answer=found), "a")
    self._known.append({})
    self._next += 1
    return found

  def _append(self, line: dict, mode: str) -> None:
    if self._writes:
      with open(self.path, mode) as f:
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())
    if mode == "w":
      self._known = [line]


def _lines(path: str) -> list[dict]:
  """The whole lines of a file."""
  if not os.path.exists(path):
    return []
  with open(path) as f:
    text = f.read()
  return [json.loads(line) for line in text.split("\n")[:-1]]


def _same(a, b) -> bool:
  if isinstance(a, dict):
    return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
  if isinstance(a, (list, tuple)):
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
  if isinstance(a, float):
    return bool(np.isclose(a, b, rtol=1e-6, atol=0))
  return a == b
