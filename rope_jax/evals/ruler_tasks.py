"""The tasks of RULER (Hsieh et al. 2024, NVIDIA/RULER), but for its question answering.

Templates (with their misspelling), answer prefixes, counts and budgets of new tokens are RULER's,
as vendored by lm-evaluation-harness 0.4.13, and so are the distributions of samples; the random
generator is our own, and so the samples are not RULER's. Other differences:

- Keys, values and names are drawn without repetition, so that there is one right answer.
- Prompts end without the space that RULER has after the prefix of `vt`, as in the harness.
- The worked example of `vt` always has 10 lines of noise, which is what RULER's 500 tokens hold
  with tokenizers of today, and is drawn anew for each sample, not only its names and value.
- `cwe` goes on with made-up words where the list ends, where RULER takes another list.
- Sentences of the haystack end where a capital follows '.', '!' or '?'; RULER asks nltk.

A task makes a sample of any size (units of haystack); `rope_jax.evals.ruler` finds the size that
fits. With the same generator a larger size only adds (`cwe`: up to the end of the list), so that
tokens grow with it.
"""

from __future__ import annotations

import math
import re
import string
import uuid
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = 40  # evenly spaced places of needles in text
SHORT = 4096  # below it, lists of words are shorter


class Example(NamedTuple):
  """The text of a prompt; how its answer begins, which follows it; and what is to be found."""

  text: str
  prefix: str
  references: list[str]


class Task(NamedTuple):
  """
  Attributes:
    new_tokens: budget of the continuation.
    smallest: least size of a sample.
    make: (rng, size, length, material) -> Example; length is in tokens and decides on little.
  """

  new_tokens: int
  smallest: int
  make: Callable


# Needles in a haystack. The first form is for one needle that is asked for, the second for more.
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NIAH = (
  "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
  "quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} "
  "mentioned in the provided text?",
  "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
  "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
  "for {query} mentioned in the provided text?",
)
_NIAH_PREFIX = (
  "The special magic {kind} for {query} mentioned in the provided text is",
  "The special magic {kind} for {query} mentioned in the provided text are",
)


def niah(
  rng,
  size,
  length,
  material,
  *,
  haystack,
  key="words",
  value="numbers",
  keys=1,
  values=1,
  queries=1,
) -> Example:
  """Needles: keys with values each, of which some keys are asked for.

  The haystack is 'noise' (size lines), 'text' (size words) or 'needles' (size distractors).
  """
  needle_rng, hay_rng, place_rng = rng.spawn(3)
  drawn: set[str] = set()
  new = partial(_draw, words=material.words, drawn=drawn)
  found = {}
  for _ in range(keys):
    k = new(key, needle_rng)
    found[k] = [new(value, needle_rng) for _ in range(values)]
  needles = [_NEEDLE.format(kind=value, key=k, value=v) for k, vs in found.items() for v in vs]
  needles = [needles[i] for i in needle_rng.permutation(len(needles))]
  asked = [list(found)[i] for i in needle_rng.choice(keys, queries, replace=False)]

  if haystack == "text":
    context = _hide_in_text(place_rng, needles, material.haystack, size)
  else:
    lines = [NOISE] * size
    if haystack == "needles":
      pairs = ((new(key, hay_rng), new(value, hay_rng)) for _ in range(size))
      lines = [_NEEDLE.format(kind=value, key=k, value=v) for k, v in pairs]
    places = np.sort(place_rng.choice(size, len(needles), replace=False))
    for place, needle in zip(places[::-1], needles):
      lines.insert(place, needle)
    context = "\n".join(lines)

  many = queries * values > 1
  query = ", ".join(asked[:-1]) + ", and " + asked[-1] if queries > 1 else asked[0]
  names = dict(kind=value if many else value.removesuffix("s"), query=query)
  text = _NIAH[many].format(context=context, **names)
  return Example(text, _NIAH_PREFIX[many].format(**names), [v for k in asked for v in found[k]])


def _hide_in_text(rng, needles: list[str], words: list[str], size: int) -> str:
  """The first words of a text (from its start again where it ends), needles between sentences."""
  text = " ".join((words * (size // len(words) + 1))[:size])
  sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
  percents = np.round(np.linspace(0, 100, DEPTHS)).astype(int)
  depths = np.sort(rng.choice(percents, len(needles), replace=False))
  places = [0, *(len(sentences) * depths // 100), len(sentences)]
  parts = []
  for start, end, needle in zip(places, places[1:], [*needles, ""]):
    parts += [" ".join(sentences[start:end]), needle]
  return " ".join(parts[:-1])


def _draw(kind: str, rng, words: list[str], drawn: set[str]) -> str:
  """A number of seven digits, a pair of words or a UUID that is not drawn yet."""
  while True:
    if kind == "numbers":
      x = str(rng.integers(10**6, 10**7))
    elif kind == "words":
      x = "-".join(words[i] for i in rng.integers(len(words), size=2))
    else:
      x = str(uuid.UUID(bytes=rng.bytes(16), version=4))
    if x not in drawn:
      drawn.add(x)
      return x


_VT = (
  "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
  "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
_VT_PREFIX = (
  "Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables "
  "are assgined the value {query}, they are:"
)
_HOPS = 4


def vt(rng, size, length, material) -> Example:
  """Variable tracking: one chain of assignments in `size` lines of noise, after an example."""
  shown_rng, rng = rng.spawn(2)
  values = rng.choice(np.arange(10_000, 99_999), 2, replace=False)
  shown = _chain(shown_rng, lines=10, letters=3, value=values[0])
  asked = _chain(rng, lines=size, letters=5, value=values[1])
  answered = f"{shown.text} {shown.prefix} {' '.join(shown.references)}"
  return asked._replace(text=f"{answered}\n\n\n\n{asked.text}")


def _chain(rng, lines: int, letters: int, value: int) -> Example:
  count = _HOPS + 1
  names = [_letters(i, letters).upper() for i in rng.choice(26**letters, count, replace=False)]
  statements = [f"VAR {names[0]} = {value}"]
  statements += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:])]
  parts = [NOISE + "\n"] * lines
  for i, place in enumerate(np.sort(rng.choice(lines, count, replace=False))):
    parts.insert(place + i, statements[i])
  text = _VT.format(context=" ".join(parts), query=value)
  return Example(text, _VT_PREFIX.format(num_v=count, query=value), names)


_CWE = (
  "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
  "the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the "
  "above list?"
)
_CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10


def cwe(rng, size, length, material) -> Example:
  """Common words: `size` different words, of which 10 appear more often; after an example."""
  shown_rng, rng = rng.spawn(2)
  short = length < SHORT
  shown, found = _word_list(shown_rng, material.words, *((20, 3, 1) if short else (40, 10, 3)))
  text, common = _word_list(rng, material.words, size, *((6, 1) if short else (30, 3)))
  # No space after the prefix: RULER has none.
  answered = f"{_CWE.format(context=shown)} {_CWE_PREFIX}{_numbered(found)}"
  return Example(f"{answered}\n{_CWE.format(context=text)}", _CWE_PREFIX, common)


def _word_list(rng, words: list[str], size: int, often: int, seldom: int) -> tuple[str, list[str]]:
  pool = words + _made_up(size - len(words), words)
  chosen = [pool[i] for i in rng.permutation(len(pool))[:size]]
  listed = chosen[:_COMMON] * often + chosen[_COMMON:] * seldom
  return _numbered([listed[i] for i in rng.permutation(len(listed))]), chosen[:_COMMON]


def _numbered(words: list[str]) -> str:
  return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _made_up(count: int, words: list[str]) -> list[str]:
  """Pronounceable words of three syllables that are not in a list; at most 343,000."""
  syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
  known, out, n = set(words), [], len(syllables)
  i = 0
  while len(out) < count:
    j = i * 123_457 % n**3  # coprime: each once, and neighbours look different
    word = syllables[j // n**2] + syllables[j // n % n] + syllables[j % n]
    out += [word] if word not in known else []
    i += 1
  return out


_FWE = (
  "Read the following coded text and track the frequency of each coded word. Find the three most "
  "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
  "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
  "text?"
)
_FWE_PREFIX = (
  "Answer: According to the coded text above, the three most frequently appeared words are:"
)


def fwe(rng, size, length, material) -> Example:
  """Frequent words: about `size` coded words by Zipf's law, alpha 2; the most frequent is '...'."""
  vocabulary = rng.choice(26**6, max(length // 50, 4), replace=False)
  names = ["...", *(_letters(i, 6) for i in vocabulary[1:])]
  zeta = math.pi**2 / 6  # of alpha
  counts = [int(size / (rank**2 * zeta)) for rank in range(1, len(names) + 1)]
  coded = [name for name, count in zip(names, counts) for _ in range(count)]
  context = " ".join(coded[i] for i in rng.permutation(len(coded)))
  return Example(_FWE.format(context=context), _FWE_PREFIX, names[1:4])


def _letters(number: int, count: int) -> str:
  """A number below 26**count as that many letters."""
  return "".join(string.ascii_lowercase[number // 26**i % 26] for i in range(count))


TASKS = dict(
  niah_single_1=Task(128, 1, partial(niah, haystack="noise")),
  niah_single_2=Task(128, 1, partial(niah, haystack="text")),
  niah_single_3=Task(128, 1, partial(niah, haystack="text", value="uuids")),
  niah_multikey_1=Task(128, 4, partial(niah, haystack="text", keys=4)),
  niah_multikey_2=Task(128, 1, partial(niah, haystack="needles")),
  niah_multikey_3=Task(128, 1, partial(niah, haystack="needles", key="uuids", value="uuids")),
  niah_multivalue=Task(128, 4, partial(niah, haystack="text", values=4)),
  niah_multiquery=Task(128, 4, partial(niah, haystack="text", keys=4, queries=4)),
  vt=Task(30, 6, vt),  # one line more than there are assignments
  cwe=Task(120, 11, cwe),  # one word besides the common ones
  fwe=Task(50, 53, fwe),  # from here on, ranks 4 and 5 never appear equally often
)
