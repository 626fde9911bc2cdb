"""Batches as a pure function of (seed, step): the state of the data is the step.

Each epoch visits every document once, in an order drawn from (seed, epoch).
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterator

import numpy as np

from rope_jax.data.arrange import Arrange
from rope_jax.data.tokens import TokenStore
from rope_jax.rope.limits import check_tokens

# Keys of a batch, each [batch, length]: int32 but for the float32 weights of the loss. Some
# arrangements of positions add fractions (float32) or short (bool), see `rope.cos_sin`.
KEYS = ("tokens", "targets", "positions", "segment_ids", "weights")


class Batches:
  """Training batches.

  'pack' joins the documents of an epoch into one stream and cuts it into sequences; segment ids
  and positions start anew with each document, and a token whose target is in the next document
  has no weight. 'document' puts one document in each sequence, cut or padded (PSC's recipe).

  Args:
    store: tokenised documents. Under 'document', its `unscored` first targets have no weight.
    length: tokens of a sequence.
    batch_size: sequences of a global batch.
    packing: 'pack' or 'document'.
    seed: of the order of documents.
    min_tokens: leave out documents with fewer tokens.
    arrange: positions that do not just count up.

  Raises:
    ValueError: if no document, or not one whole sequence, is left, or the sequences are longer
      than int32 positions reach.
  """

  def __init__(
    self,
    store: TokenStore,
    *,
    length: int,
    batch_size: int,
    packing: str,
    seed: int,
    min_tokens: int = 0,
    arrange: Arrange | None = None,
  ):
    check_tokens("config.data.length", length)
    self.arrange = arrange
    self.store, self.length, self.batch_size, self.seed = store, length, batch_size, seed
    self.packing = packing
    self.documents = np.flatnonzero(store.lengths >= max(min_tokens, 2))
    if not len(self.documents):
      raise ValueError(
        f"config.data.min_tokens={min_tokens}: no document of {len(store)} has "
        f"{max(min_tokens, 2)} tokens"
      )
    self.total = int(store.lengths[self.documents].sum())
    # One token more than the sequence, for the last target; streams share it with their neighbour.
    self.per_epoch = len(self.documents) if packing == "document" else (self.total - 1) // length
    if self.per_epoch < 1:
      raise ValueError(
        f"config.data.length={length}: the corpus has {self.total} tokens, too few for one sequence"
      )
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def __call__(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """The batch of a step (0, 1, ...), or the rows of it that this process feeds."""
    first = step * self.batch_size
    numbers = range(first, first + self.batch_size)[rows]
    if self.arrange and self.arrange.kind == "pose":
      sequences = self._skipping(numbers)
    else:
      sequences = [self._sequence(n) for n in numbers]
    batch = {key: np.stack([s[key] for s in sequences]) for key in KEYS}
    return self.arrange(batch, step, np.asarray(numbers)) if self.arrange else batch

  def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Order of the documents, and where each starts in the stream of the epoch."""
    order = np.random.default_rng((self.seed, epoch)).permutation(self.documents)
    return order, np.concatenate([[0], np.cumsum(self.store.lengths[order])])

  def _sequence(self, number: int) -> dict[str, np.ndarray]:
    epoch, index = divmod(number, self.per_epoch)
    order, starts = self._epoch(epoch)
    if self.packing == "document":
      sequence = _join([self.store.slice(order[index], 0, self.length + 1)], self.length)
      sequence["weights"][: self.store.unscored] = 0
      return sequence
    pieces = []
    first, need = index * self.length, self.length + 1
    i = int(np.searchsorted(starts, first, side="right")) - 1
    start = first - starts[i]
    while need:
      ids = self.store.slice(order[i], start, start + need)
      pieces.append(ids)
      need, i, start = need - len(ids), i + 1, 0
    return _join(pieces, self.length)

  def _skipping(self, numbers) -> list[dict[str, np.ndarray]]:
    """PoSE: two chunks of one document in each sequence, with positions of their own."""
    places = [divmod(n, self.per_epoch) for n in numbers]
    documents = [self._epoch(epoch)[0][index] for epoch, index in places]
    tokens = self.store.lengths[documents]
    sequences = []
    for i, n, index, positions in zip(
      documents, tokens, *self.arrange.text(np.asarray(numbers), tokens)
    ):
      index = index[: min(n, self.length + 1)]
      ids = self.store.slice(i, 0, index[-1] + 1)[index]
      sequence = _join([ids], self.length)
      sequences.append(dict(sequence, positions=positions[: self.length]))
    return sequences


def _join(pieces: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
  """One sequence of these pieces of documents; positions count from the start of each piece."""
  ids = np.concatenate(pieces)
  positions = np.concatenate([np.arange(len(p)) for p in pieces])
  segments = np.repeat(np.arange(len(pieces)), [len(p) for p in pieces])
  padding = length + 1 - len(ids)
  ids, positions = np.pad(ids, (0, padding)), np.pad(positions, (0, padding))
  segments = np.pad(segments, (0, padding), constant_values=-1)
  return dict(
    tokens=ids[:-1].astype(np.int32),
    targets=ids[1:].astype(np.int32),
    positions=positions[:-1].astype(np.int32),
    segment_ids=segments[:-1].astype(np.int32),
    weights=((segments[:-1] == segments[1:]) & (segments[1:] >= 0)).astype(np.float32),
  )


def prefetch(make: Callable[[int], dict], start: int, stop: int) -> Iterator[dict]:
  """Yields make(start), ..., make(stop - 1), each made while the device works on the one before."""
  with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
    ahead = pool.submit(make, start) if start < stop else None
    for step in range(start, stop):
      ready = ahead.result()
      if step + 1 < stop:
        ahead = pool.submit(make, step + 1)
      yield ready
