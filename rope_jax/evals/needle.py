"""Needle perplexity: of a number that was hidden in long text, when it is asked for at the end.

LongRoPE2's fitness of rescale factors: plain perplexity is mostly about near tokens, this is about
far ones. The template is the one of the paper.

'start'   the paper: the needle comes before the text.
'spread'  the authors' code: in one of ten equal parts of the text, at a random place of it.

Every sequence has exactly L tokens, BOS (where the tokenizer adds one itself) and the answer
included. Adjectives and nouns of the needle's name are our own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from rope_jax.errors import check as expect
from rope_jax.errors import choice
from rope_jax.evals.common import check_files, check_lengths, check_positive, pieces

PLACEMENTS = ("start", "spread")
BINS = 10  # parts of the text under placement 'spread'

TASK = (
  "A special magic number is hidden within the following text. Make sure to memorize it. "
  "I will quiz you about the number afterwards."
)
NEEDLE = "One of the special magic numbers for {name} is: {number}."
QUESTION = (
  "What is the special magic number for {name} mentioned in the provided text? "
  "The special magic number for {name} mentioned in the provided text is"
)
ADJECTIVES = (
  "ancient", "brave", "bright", "calm", "clever", "curious", "distant", "eager", "faint",
  "gentle", "golden", "heavy", "hollow", "icy", "lively", "mellow", "narrow", "numerous", "odd",
  "patient", "quiet", "rapid", "silver", "tidy", "vivid", "wooden",
)  # fmt: skip
NOUNS = (
  "anchor", "basket", "bridge", "candle", "castle", "cloud", "compass", "ferry", "forest",
  "garden", "hammer", "harbor", "kettle", "kite", "ladder", "lantern", "meadow", "mirror",
  "orchard", "pebble", "river", "saddle", "tunnel", "valley", "violin", "window",
)  # fmt: skip


class Sample(NamedTuple):
  """A sequence.

  Attributes:
    tokens: [L] int32.
    first: the first token of the answer, which is the end of the sequence.
    part: of the text, 0 .. 9, that has the needle; None where it precedes the text.
  """

  tokens: np.ndarray
  first: int
  part: int | None


def evaluate(entry, subject) -> dict:
  """Perplexity of the answers for each of entry.lengths; see the keys of `config.needle`.

  Returns:
    {"8192": {"metric": "ppl", "ppl", "stderr", "nll", "tokens", "samples", "placement",
    "by_depth": [{"depth", "ppl", "stderr", "nll", "tokens", "samples"}, ...]}, ...}. `tokens` are
    those of the answers, `nll` their mean loss in nats. `stderr` is the standard error of `ppl`
    over samples, since the digits of one answer are not independent; it is absent for one sample.
    `by_depth`, by the middle of the part of the text, only under placement 'spread'.

  Raises:
    ValueError: if the text is too short for the samples asked for, or a length for the question.
  """
  texts = pieces(entry, max(entry.lengths), subject)
  return {str(n): _at_length(entry, subject, samples(entry, subject, texts, n), n)
          for n in entry.lengths}  # fmt: skip


def validate(name: str, e, c) -> None:
  """Raises ValueError, naming the key, for settings that do not fit."""
  choice(f"{name}.placement", e.placement, PLACEMENTS)
  check_positive(name, e, "num_samples batch_size")
  for key in ("start", "seed"):
    expect(e[key] >= 0, f"{name}.{key}", e[key], "0 or more")
  if e.placement == "spread":
    expect(e.num_samples % BINS == 0, f"{name}.num_samples", e.num_samples,
           f"a multiple of {BINS} under placement 'spread', as many at each depth")  # fmt: skip
  check_files(f"{name}.files", e.files)
  check_lengths(name, e, c)


def check(entry, subject) -> None:
  """Raises ValueError if the text or a length is too short."""
  texts = pieces(entry, max(entry.lengths), subject)
  for n in entry.lengths:
    samples(entry, subject, texts, n)


def lengths(entry) -> tuple[int, ...]:
  """Tokens of the sequences."""
  return entry.lengths


def samples(entry, subject, texts: list[np.ndarray], length: int) -> list[Sample]:
  """The sequences of a length; texts are the ids of at least as many tokens, one for each."""
  rng = np.random.default_rng(entry.seed)
  out = []
  for i, text in enumerate(texts):
    name = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
    number = str(rng.integers(10**6, 10**7))
    jitter = rng.random()
    part = i % BINS if entry.placement == "spread" else None
    depth = 0.0 if part is None else (part + jitter) / BINS
    out.append(_sample(subject, text, length, name, number, depth, part))
  return out


def rows(entry, subject, length: int) -> list[tuple[np.ndarray, int]]:
  """The sequences of a length, [length] int32, each with the first token of its answer."""
  found = samples(entry, subject, pieces(entry, length, subject), length)
  return [(sample.tokens, sample.first) for sample in found]


def answered(tokenizer, question: str, number: str) -> tuple[np.ndarray, np.ndarray]:
  """Ids of a question and of its answer, the digits alone.

  They are tokenised together, as a model has seen such text; a token of only the space between
  them belongs to the question.
  """
  ids, alone = tokenizer.encode(f"{question} {number}"), tokenizer.encode(question)
  n = 0
  while n < len(alone) and ids[n] == alone[n]:
    n += 1
  while n < len(ids) - 1 and not tokenizer.decode(ids[n : n + 1]).strip():
    n += 1
  return ids[:n], ids[n:]


def _sample(subject, text, length: int, name: str, number: str, depth: float, part) -> Sample:
  encode = subject.tokenizer.encode
  start = subject.prompt(TASK + "\n")
  newline = "" if part is None else "\n"  # where text precedes it
  needle = encode(newline + NEEDLE.format(name=name, number=number) + "\n")
  question, answer = answered(subject.tokenizer, "\n" + QUESTION.format(name=name), number)
  room = length - len(start) - len(needle) - len(question) - len(answer)
  if room < 1:
    raise ValueError(
      f"lengths={length}: expected more than the {length - room} tokens of needle and question"
    )
  before = int(depth * room)
  parts = [start, text[:before], needle, text[before:room], question, answer]
  return Sample(np.concatenate(parts).astype(np.int32), length - len(answer), part)


def _at_length(entry, subject, rows: list[Sample], length: int) -> dict:
  sums = []  # (loss, tokens) of each answer
  size = entry.batch_size
  for i in tqdm(range(0, len(rows), size), desc=f"needle {length}", disable=None, leave=False):
    group = rows[i : i + size]
    # A last, smaller group is filled up: another shape would compile again.
    tokens = np.stack([row.tokens for row in group] + [group[0].tokens] * (size - len(group)))
    losses = np.asarray(subject.losses(tokens, length), np.float64)
    for loss, row in zip(losses, group):
      scored = loss[row.first - 1 :]  # loss[p - 1] is that of token p
      sums.append((scored.sum(), len(scored)))
  result = dict(metric="ppl", **_summary(sums), placement=entry.placement)
  if entry.placement == "spread":
    result["by_depth"] = [
      dict(depth=(b + 0.5) / BINS, **_summary([s for s, row in zip(sums, rows) if row.part == b]))
      for b in range(BINS)
    ]
  return result


def _summary(sums: list[tuple[float, int]]) -> dict:
  losses, tokens = np.array(sums, np.float64).T
  n, total = len(sums), tokens.sum()
  nll = losses.sum() / total
  ppl = math.exp(min(nll, 700.0))
  out = dict(ppl=ppl, nll=nll, tokens=int(total), samples=n)
  if n > 1:
    # Of a ratio of means, as answers may differ in tokens.
    error = math.sqrt(n / (n - 1) * np.square(losses - nll * tokens).sum()) / total
    out["stderr"] = ppl * error
  return out
