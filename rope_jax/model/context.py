"""Context parallelism: one sequence over the devices of the mesh axis 'context'.

Queries stay where they are. Keys come to them all at once (`all_gather`) or go round, one device
to the next, while the softmax is put together (`ring`; Liu et al., arXiv 2310.01889). In the
balanced order each device owns an early and a late chunk of the sequence, so that under the causal
mask all have the same work (Brandon et al., Striped Attention, arXiv 2311.09431, with chunks in
place of stripes).

A `Kernel` (rope_jax/model/blockwise.py, splash.py) computes queries against keys in the order of
the sequence, of which each query sees the first so many, but for those before its window, if there
is one (`window` tokens, itself included). How many is counted here, from the chunks that came with
the keys; rotation is already in them, with the positions that the caller gave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.model.blockwise import MASKED

AXIS = "context"


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Attention of a device: `forward` and `backward` as in rope_jax/model/blockwise.py."""

  forward: Callable
  backward: Callable


def check_split(length: int, shards: int, balanced: bool) -> int:
  """Into how many equal chunks `order` splits a sequence; makes no array of its tokens.

  Args:
    length, shards, balanced: as for `order`.

  Raises:
    ValueError: if the chunks are not equal.
  """
  pieces = 2 * shards if balanced and shards > 1 else shards
  if length % pieces:
    raise ValueError(
      f"config.mesh.context={shards}: {length:,} tokens cannot be split into {pieces} equal chunks"
      + (" (two a device: config.model.load_balance)" if pieces > shards else "")
    )
  return pieces


def order(length: int, shards: int, balanced: bool) -> np.ndarray:
  """Which token of a sequence stands at each place, int32 [length].

  Args:
    length: tokens.
    shards: devices over which they are split, in equal runs of places.
    balanced: device i owns chunks i and 2 shards - 1 - i of 2 shards; otherwise tokens stand in
      order.

  Raises:
    ValueError: if the chunks are not equal.
  """
  pieces = check_split(length, shards, balanced)
  tokens = np.arange(length, dtype=np.int32)
  if pieces == shards:
    return tokens
  chunks = tokens.reshape(pieces, -1)
  return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def all_gather(kernel: Kernel, shards: int, balanced: bool, window: int = 0) -> Kernel:
  """Every device gathers all keys; their gradients are summed back to their owners."""
  chunks = 2 * shards if balanced else shards
  # Gathered chunks stand in the order of their owners: `restore` sorts them, `scatter` undoes it.
  scatter = order(chunks, shards, balanced)
  restore = np.argsort(scatter)

  def gather(x, axis):
    x = jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)
    return _take_chunks(x, restore, axis) if balanced else x

  def reduce(x):
    x = _take_chunks(x, scatter, 2) if balanced else x
    return jax.lax.psum_scatter(x, AXIS, scatter_dimension=2, tiled=True)

  def keys(q, k, v, segments):
    starts = _starts(jax.lax.axis_index(AXIS), shards, q.shape[2], balanced)
    visible, hidden = up_to(_numbers(starts, q.shape[2]), window)
    others = None if segments is None else gather(segments, 1)
    return (gather(k, 2), gather(v, 2), visible, segments, others), hidden

  def forward(q, k, v, segments):
    given, hidden = keys(q, k, v, segments)
    return kernel.forward(q, *given, hidden=hidden)

  def backward(q, k, v, segments, out, logsumexp, d_out):
    given, hidden = keys(q, k, v, segments)
    d_q, d_k, d_v = kernel.backward(q, *given, out, logsumexp, d_out, hidden=hidden)
    return d_q, reduce(d_k), reduce(d_v)

  return Kernel(forward, backward)


def ring(kernel: Kernel, shards: int, balanced: bool, window: int = 0) -> Kernel:
  """Keys, with their segments and the numbers of their chunks, go once round the devices.

  Half of the heads go each way, so that both links of a device are busy. The backward pass sends
  them round again, and their gradients with them: nothing of a hop is kept but its part in the
  output and the normaliser. A hop without a key in the window of any query computes nothing.
  """

  def pass_on(tree, way):
    neighbours = [(i, (i + way) % shards) for i in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, neighbours), tree)

  def own(q, k, v, segments):
    """Numbers of the queries, and for each way the heads of q, and what travels."""
    starts = _starts(jax.lax.axis_index(AXIS), shards, q.shape[2], balanced)
    parts = len(ways(k.shape[1], shards))
    q, k, v = (jnp.split(x, parts, axis=1) for x in (q, k, v))
    return _numbers(starts, q[0].shape[2]), q, [(*kv, segments, starts) for kv in zip(k, v)]

  def sees(numbers, starts, length):
    hidden = _held(numbers - window, starts, length) if window else None
    return _held(numbers, starts, length), hidden

  def forward(q, k, v, segments):
    numbers, queries, travelling = own(q, k, v, segments)

    def one(q, way, carry):
      out, logsumexp, travelling = carry
      k, v, others, starts = travelling
      # Sent before the work, which does not wait for it.
      following = pass_on(travelling, way)
      visible, hidden = sees(numbers, starts, k.shape[2])
      part, part_logsumexp = kernel.forward(q, k, v, visible, segments, others, hidden=hidden)
      total = jnp.logaddexp(logsumexp, part_logsumexp)
      out = out * jnp.exp(logsumexp - total)[..., None]
      out += part.astype(jnp.float32) * jnp.exp(part_logsumexp - total)[..., None]
      return out, total, following

    def hop(_, carries):
      return [one(*x) for x in zip(queries, ways(k.shape[1], shards), carries)]

    start = [
      (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASKED), sent)
      for q, sent in zip(queries, travelling)
    ]
    outs, logsumexps, _ = zip(*jax.lax.fori_loop(0, shards, hop, start))
    return jnp.concatenate(outs, axis=1).astype(q.dtype), jnp.concatenate(logsumexps, axis=1)

  def backward(q, k, v, segments, out, logsumexp, d_out):
    numbers, queries, travelling = own(q, k, v, segments)
    results = zip(*(jnp.split(x, len(queries), axis=1) for x in (out, logsumexp, d_out)))

    def one(q, results, way, carry):
      d_q, d_k, d_v, travelling = carry
      k, v, others, starts = travelling
      following = pass_on(travelling, way)
      visible, hidden = sees(numbers, starts, k.shape[2])
      parts = kernel.backward(q, k, v, visible, segments, others, *results, hidden=hidden)
      d_q, d_k, d_v = (d + part.astype(jnp.float32) for d, part in zip((d_q, d_k, d_v), parts))
      return d_q, *pass_on((d_k, d_v), way), following

    lanes = list(zip(queries, results, ways(k.shape[1], shards)))

    def hop(_, carries):
      return [one(*lane, carry) for lane, carry in zip(lanes, carries)]

    start = [
      (*(jnp.zeros(x.shape, jnp.float32) for x in (q, *sent[:2])), sent)
      for q, sent in zip(queries, travelling)
    ]
    gradients = list(zip(*jax.lax.fori_loop(0, shards, hop, start)))[:3]
    return tuple(jnp.concatenate(halves, axis=1) for halves in gradients)

  return Kernel(forward, backward)


def ways(kv_heads: int, shards: int) -> tuple[int, ...]:
  """Directions round the ring of equal parts of the KV heads of a device."""
  return (1, -1) if kv_heads % 2 == 0 and shards > 2 else (1,)


def alone(kernel: Kernel, window: int = 0) -> Kernel:
  """The whole sequence on one device."""

  def forward(q, k, v, segments):
    visible, hidden = up_to(jnp.arange(q.shape[2]), window)
    return kernel.forward(q, k, v, visible, segments, segments, hidden=hidden)

  def backward(q, k, v, segments, out, logsumexp, d_out):
    visible, hidden = up_to(jnp.arange(q.shape[2]), window)
    given = (q, k, v, visible, segments, segments, out, logsumexp, d_out)
    return kernel.backward(*given, hidden=hidden)

  return Kernel(forward, backward)


def up_to(numbers, window):
  """(visible, hidden) of queries with these numbers, from that of the first key; see `Kernel`.

  Where there is a window, hidden is visible - window, whatever keys there are: splash attention
  relies on it.
  """
  return numbers + 1, numbers + 1 - window if window else None


def _starts(shard, shards, length, balanced):
  """First token of each chunk of a shard, in order; int32 [1] or [2]."""
  if not balanced:
    return jnp.stack([shard * length])
  return jnp.stack([shard, 2 * shards - 1 - shard]) * (length // 2)


def _numbers(starts, length):
  """Numbers in the sequence of the tokens of these chunks, increasing; int32 [length]."""
  chunk = length // len(starts)
  return (starts[:, None] + jnp.arange(chunk)).reshape(-1)


def _held(numbers, starts, length):
  """How many of the keys in these chunks are not after each number; they are the first ones."""
  chunk = length // len(starts)
  return jnp.clip(numbers[:, None] - starts + 1, 0, chunk).sum(-1)


def _take_chunks(x, chunks, axis):
  """The equal chunks of an axis in another order."""
  shape = x.shape
  x = x.reshape(*shape[:axis], len(chunks), -1, *shape[axis + 1 :])
  return jnp.take(x, chunks, axis=axis).reshape(shape)
