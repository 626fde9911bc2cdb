"""Accuracy on PosGen by position: within the length of a training sequence, and beyond it.

The metric of Resonance RoPE (arXiv 2403.00071, section 6.1; sheryc/resonance_rope): each token is
predicted by argmax with the true tokens before it, and all positions of all sequences count the
same. Tokens are counted from x_0, the EOS before it left out; those of the seed are not scored.
"""

from __future__ import annotations

import math

import numpy as np
from tqdm import tqdm

from rope_jax.config import train_length
from rope_jax.data import posgen
from rope_jax.errors import MOST, choice
from rope_jax.errors import check as expect
from rope_jax.evals.common import check_positive


def evaluate(entry, subject) -> dict:
  """Accuracy on sequences of entry.length tokens; `config.posgen` says what can be set.

  Returns:
    {"in distribution": {"metric": "accuracy", "accuracy", "stderr", "samples", "tokens", "start",
    "end"}, "out of distribution": {the same, ...}}: tokens start .. end - 1 of `samples` sequences,
    before and from data.length on (a column without tokens is left out). `by_position`, in the
    last column, has parts of entry.every_tokens over the whole sequence. `stderr` is over
    sequences: tokens of one are not independent.
  """
  c = subject.config
  p, size = c.data.posgen, entry.batch_size
  rows = posgen.examples(p, entry.split, entry.length)[: entry.num_samples]
  correct = np.zeros((len(rows), entry.length), bool)
  for i in tqdm(range(0, len(rows), size), desc="posgen", disable=None, leave=False):
    group = rows[i : i + size]
    # A last, smaller group is filled up: another shape would compile again.
    padded = np.concatenate([group, np.repeat(group[:1], size - len(group), axis=0)])
    found = subject.predictions(padded[:, :-1], entry.length)  # x_l is predicted at place l
    correct[i : i + size] = (np.asarray(found) == padded[:, 1:])[: len(group)]
  first, trained = p.far + p.near, min(train_length(c), entry.length)
  edges = [first, *range(entry.every_tokens, entry.length, entry.every_tokens), entry.length]
  edges = [n for n in edges if n >= first]
  out = {
    "in distribution": _accuracy(correct, first, trained),
    "out of distribution": _accuracy(correct, trained, entry.length),
  }
  out = {column: dict(r, metric="accuracy") for column, r in out.items() if r["tokens"]}
  parts = [_accuracy(correct, a, b) for a, b in zip(edges, edges[1:]) if a < b]
  list(out.values())[-1].update(by_position=parts, show="by_position")
  return out


def validate(name: str, e, c) -> None:
  """Raises ValueError, naming the key, for settings that do not fit."""
  p = c.data.posgen
  expect(c.data.source == "posgen", f"{name}.type", e.type,
         f"another, since data.source={c.data.source!r}, not 'posgen'")  # fmt: skip
  choice(f"{name}.split", e.split, posgen.SPLITS[1:])
  check_positive(name, e, "every_tokens batch_size")
  expect(2 <= e.num_samples <= p.held_out, f"{name}.num_samples", e.num_samples,
         f"from 2 to data.posgen.held_out={p.held_out}")  # fmt: skip
  expect(p.far + p.near < e.length <= c.rope.context, f"{name}.length", e.length,
         f"above data.posgen.far + near = {p.far + p.near} and at most rope.context="
         f"{c.rope.context}")  # fmt: skip
  expect(e.batch_size * e.length <= MOST, f"{name}.batch_size", e.batch_size,
         f"at most {MOST:,} tokens at a time, with {e.length:,} in a sequence")  # fmt: skip


def lengths(entry) -> tuple[int, ...]:
  """Tokens of the sequences: EOS, and all of x but the last, after which nothing is predicted."""
  return (entry.length,)


def check(entry, subject) -> None:
  """There is nothing to read."""


def _accuracy(correct, start: int, end: int) -> dict:
  scored = correct[:, start:end]
  out = dict(start=start, end=end, tokens=scored.size)
  if scored.size:
    by_sequence = scored.mean(1)
    stderr = by_sequence.std(ddof=1) / math.sqrt(len(by_sequence))
    out |= dict(accuracy=float(by_sequence.mean()), stderr=float(stderr), samples=len(scored))
  return out
