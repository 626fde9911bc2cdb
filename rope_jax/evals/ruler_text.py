"""What RULER's samples are made of: the text that hides needles, and words.

RULER has Paul Graham's essays and the word lists of `wonderwords`; neither comes with Python, so
the defaults here are the prose of Python's own manual and its words.
"""

from __future__ import annotations

import functools
import math
import platform
import pydoc_data.topics
import re
from typing import NamedTuple

from rope_jax.evals.common import texts

# Tokens that the shortest needle has with any tokenizer, about; a needle takes a new pair of words.
_NEEDLE_TOKENS = 10


class Material(NamedTuple):
  """
  Attributes:
    haystack: words of the text, in order.
    words: a list without repetitions.
    haystack_name, words_name: where they are from, for people.
  """

  haystack: list[str]
  words: list[str]
  haystack_name: str
  words_name: str


def load(entry, c) -> Material:
  """The material that an entry names.

  Raises:
    ValueError: if a file is missing or empty, or there are too few words for the lengths.
  """
  python = f"pydoc_data.topics of Python {platform.python_version()}"
  text = " ".join(texts(entry.haystack, c, "haystack")) if entry.haystack else manual()
  haystack = text.split()
  if not haystack:
    raise ValueError(f"haystack={entry.haystack!r}: expected files with text")
  words = _read_words(entry.words) if entry.words else manual_words()
  # Twice as many pairs as the longest prompt can hold, so that distinct ones are soon drawn.
  needed = math.ceil(math.sqrt(2 * max(entry.lengths) / _NEEDLE_TOKENS))
  if len(words) < needed:
    raise ValueError(
      f"words={entry.words!r}: expected at least {needed} words for a length of "
      f"{max(entry.lengths)}; there are {len(words)}"
    )
  return Material(haystack, words, entry.haystack or python, entry.words or python)


@functools.cache
def manual() -> str:
  """The paragraphs of Python's manual that are prose: no code, no grammar, no tables."""
  topics = pydoc_data.topics.topics
  paragraphs = [p.strip() for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name])]
  # Some topics share sections.
  prose = dict.fromkeys(
    " ".join(p.split()) for p in paragraphs if re.match(r"[A-Z].*\.\Z", p, re.S)
  )
  return " ".join(prose)


@functools.cache
def manual_words() -> list[str]:
  """The lower-case words of four letters or more in that prose, sorted."""
  return sorted(set(re.findall(r"\b[a-z]{4,}\b", manual())))


def _read_words(path: str) -> list[str]:
  from rope_jax.data.text_builder import read_text

  try:
    lines = read_text(path).split("\n")
  except ValueError as error:
    raise ValueError(
      f"words={path!r}: {error}; expected an existing file with a word on each line"
    ) from None
  return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
