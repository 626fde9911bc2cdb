"""Perplexity by context length, under three protocols whose numbers are not comparable.

'sliding'      Press et al. / PI: a window of L tokens moves by `stride`; the first window scores
               all its tokens, each later one only its new tokens; every token counts the same.
'sliding_all'  LongLoRA (and, it seems, PSC): windows start every `stride` tokens and every token
               of each window is scored.
'truncate'     YaRN's Proof-pile numbers: one window from the start of each sample, no sliding.

Samples are pieces of documents: the first piece of each, and only if they are too few the second
pieces, and so on; with num_samples up to the number of documents it is one sample a document. A
piece has as many tokens as the longest of the lengths: with other lengths, other documents are long
enough, and the value of a length that both have is of another text. "text" in the result tells.

Every window has exactly L tokens, BOS included where the tokenizer adds one itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from rope_jax.errors import check as expect
from rope_jax.errors import choice
from rope_jax.evals.common import check_files, check_lengths, check_positive, pieces

MOST_BUCKETS = 2**16
PROTOCOLS = ("sliding", "sliding_all", "truncate")


def evaluate(entry, subject) -> dict:
  """Perplexity for each of entry.lengths; the keys of `config.perplexity` say what can be set.

  Returns:
    {"8192": {"metric": "ppl", "ppl", "stderr", "nll", "tokens", "windows", "protocol",
    "text", "by_position": [{"start", "end", "ppl", "stderr", "nll", "tokens"}, ...]}, ...}.
    `stderr` is the standard error of `ppl` over tokens as if independent (they are not quite: read
    it as a lower bound). `by_position` is by the place of the token in its window, in equal parts.

  Raises:
    ValueError: if the text is too short for the samples asked for.
  """
  samples = _samples(entry, subject)
  return {str(n): _at_length(entry, subject, samples, n) for n in entry.lengths}


def validate(name: str, e, c) -> None:
  """Raises ValueError, naming the key, for settings that do not fit."""
  choice(f"{name}.protocol", e.protocol, PROTOCOLS)
  check_positive(name, e, "stride num_samples buckets batch_size")
  expect(e.buckets <= MOST_BUCKETS, f"{name}.buckets", e.buckets, f"at most {MOST_BUCKETS:,}")
  for key in ("start", "document_tokens"):
    expect(e[key] >= 0, f"{name}.{key}", e[key], "0 or more")
  check_lengths(name, e, c)
  expect(e.document_tokens == 0 or e.document_tokens >= max(e.lengths), f"{name}.document_tokens",
         e.document_tokens, f"0 or at least the longest length, {max(e.lengths)}")  # fmt: skip
  if e.protocol == "sliding":
    expect(e.stride <= min(e.lengths), f"{name}.stride", e.stride,
           f"at most the shortest length, {min(e.lengths)}: else tokens are left out")  # fmt: skip
  if e.protocol == "truncate":
    expect(e.document_tokens == 0, f"{name}.document_tokens", e.document_tokens,
           "0 under protocol 'truncate', which reads one window a document")  # fmt: skip
  check_files(f"{name}.files", e.files)


def lengths(entry) -> tuple[int, ...]:
  """Tokens of the windows."""
  return entry.lengths


def check(entry, subject) -> None:
  """Raises ValueError if there is not enough text for the samples asked for."""
  _samples(entry, subject)


def windows(
  protocol: str, tokens: int, body: int, stride: int, first: int
) -> Iterator[tuple[int, int]]:
  """(start, first scored token) of each window of `body` tokens over a document of `tokens`.

  `first` is 1 where nothing precedes the first token of a window to predict it from, 0 with BOS.
  Sliding windows end `stride` tokens after the one before; the last ends with the document, so
  that it is as long as the others.
  """
  if protocol == "sliding_all":
    for start in range(0, tokens - body + 1, stride):
      yield start, start + first
    return
  yield 0, first
  end = body
  while protocol == "sliding" and end < tokens:
    scored, end = end, min(end + min(stride, body), tokens)
    yield end - body, max(scored, end - body + first)


def rows(entry, subject, length: int) -> list[tuple[np.ndarray, int]]:
  """The windows of a length, [length] int32, each with the first token that is scored."""
  return _windows(entry, subject, _samples(entry, subject), length)


def _samples(entry, subject) -> list[np.ndarray]:
  return pieces(entry, entry.document_tokens or max(entry.lengths), subject)


def _windows(entry, subject, samples, length: int) -> list[tuple[np.ndarray, int]]:
  bos = [subject.tokenizer.bos_id] if subject.tokenizer.adds_bos else []
  body = length - len(bos)
  return [
    (np.concatenate([bos, ids[start : start + body]]).astype(np.int32), scored - start + len(bos))
    for ids in samples
    for start, scored in windows(entry.protocol, len(ids), body, entry.stride, 1 - len(bos))
  ]


def _at_length(entry, subject, samples, length: int) -> dict:
  rows = _windows(entry, subject, samples, length)
  sums = np.zeros((entry.buckets, 3))  # of count, loss and loss squared
  bucket = np.arange(length) * entry.buckets // length
  size = entry.batch_size
  for i in tqdm(range(0, len(rows), size), desc=f"perplexity {length}", disable=None, leave=False):
    group = rows[i : i + size]
    # A last, smaller group is filled up: another shape would compile again.
    tokens = np.stack([tokens for tokens, _ in group] + [group[0][0]] * (size - len(group)))
    losses = np.asarray(subject.losses(tokens, length), np.float64)
    for loss, (_, first) in zip(losses, group):
      scored = loss[first - 1 :]  # loss[p - 1] is that of token p
      for column, values in enumerate((np.ones_like(scored), scored, scored**2)):
        sums[:, column] += np.bincount(bucket[first:], values, entry.buckets)
  edges = [math.ceil(b * length / entry.buckets) for b in range(entry.buckets + 1)]
  by_position = [
    dict(start=a, end=b, **_summary(*s)) for a, b, s in zip(edges, edges[1:], sums) if s[0]
  ]
  total = sums.sum(0)
  read = hashlib.sha256()
  for tokens, first in rows:
    read.update(tokens[max(first - 1, 0) :].tobytes())
  return dict(
    metric="ppl",
    **_summary(*total),
    windows=len(rows),
    protocol=entry.protocol,
    text=read.hexdigest()[:8],
    by_position=by_position,
  )


def _summary(count: float, total: float, squares: float) -> dict:
  mean = total / count
  variance = max(squares / count - mean**2, 0.0)
  ppl = math.exp(min(mean, 700.0))
  return dict(ppl=ppl, stderr=ppl * math.sqrt(variance / count), nll=mean, tokens=int(count))
