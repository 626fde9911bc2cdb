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

from rope_jax import reading

_MOST_BYTES = 2**32  # a search may be long


class Journal:
  """Questions and answers in a file of JSON lines.

  Args:
    path: of the file; one that is there is continued.
    settings: of the search, plain data; the first line.
    writes: whether this process, of several that all compute the same, writes.

  Raises:
    ValueError: if the file is of a search with other settings, naming them, or is damaged or of
      another kind. It is left as it is.
  """

  def __init__(self, path: str, settings: dict, writes: bool = True):
    self.path, self._writes = path, writes
    settings = json.loads(json.dumps(settings))
    self._known, whole, rest = _lines(path, settings)
    self._next = 1
    if not self._known:
      self._append(settings, "w")
      return
    changed = [f"{k}={settings.get(k)!r} (was {self._known[0].get(k)!r})"
               for k in sorted(settings | self._known[0])
               if settings.get(k) != self._known[0].get(k)]  # fmt: skip
    if changed:
      raise ValueError(
        f"{path} holds a search with other settings; choose another --workdir, or set back: "
        + reading.listed(changed)
      )
    if writes and rest:  # of a line that was being written
      with open(path + ".tmp", "w", encoding="utf-8", newline="") as f:
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


def _lines(path: str, settings: dict) -> tuple[list[dict], str, str]:
  """The whole lines of a file, settings, then questions with answers; their text; the rest."""
  if not os.path.lexists(path):
    return [], "", ""
  text = reading.read_text(path, _MOST_BYTES)
  *whole, rest = text.split("\n")
  if not whole and not json.dumps(settings).startswith(rest):
    # Only what a search with these settings was writing when it was cut off may be written over.
    raise _damaged(path, 1, "no whole line, and not the beginning of these settings")
  out = []
  for number, written in enumerate(whole, 1):
    try:
      line = reading.parse(written)
    except ValueError as error:
      raise _damaged(path, number, error) from None
    if not isinstance(line, dict) or number > 1 and not _is_answer(line):
      raise _damaged(path, number, "not what a search writes")
    out.append(line)
  return out, text.removesuffix(rest), rest


def _is_answer(line: dict) -> bool:
  """Whether a line has a question, and the numbers that answer it, one for each candidate."""
  question, answer = line.get("question"), line.get("answer")
  if line.keys() != {"question", "answer"} or not isinstance(question, dict):
    return False
  if not isinstance(answer, list) or not all(map(reading.is_number, answer)):
    return False
  asked = question.get("fitness", question.get("gradient"))
  return isinstance(asked, list) and len(asked) == len(answer)


def _damaged(path: str, number: int, what) -> ValueError:
  return reading.refusal(
    path, f"line {number} is damaged ({what}); choose another --workdir, or delete the file"
  )


def _same(a, b) -> bool:
  if isinstance(a, dict):
    return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
  if isinstance(a, (list, tuple)):
    return (
      isinstance(b, list | tuple) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    )
  if isinstance(a, float):
    return reading.is_number(b) and bool(np.isclose(a, b, rtol=1e-6, atol=0))
  return a == b
