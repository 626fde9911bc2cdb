"""Blockwise attention in plain JAX, for any backend: memory linear in the length.

Online softmax over blocks of keys, in the forward and in a backward pass that computes the scores
again; blocks that no query of a block sees are never touched. Loops, not unrolled code: XLA would
schedule unrolled blocks side by side and memory would grow with L^2 again.
Source: Dao et al., FlashAttention (arXiv 2205.14135); Milakov and Gimelshein (1805.02867).

Shapes: q [B, H, Lq, E]; k, v [B, K, Lk, E] with H a multiple of K (grouped queries); visible and
hidden [Lq] int32, not decreasing: query t sees the first visible[t] keys (all, if there are fewer)
but for the first hidden[t], if given; segments_q [B, Lq], segments_k [B, Lk] or both None: of those
keys, only the ones of its segment.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Finite, so that exp(masked - maximum) is 0 and never NaN, even where a whole block is masked.
MASKED = -1e30


def forward(
  q, k, v, visible, segments_q=None, segments_k=None, *, hidden=None, block_q=128, block_k=256
):
  """Attention and its normaliser.

  Returns:
    out like q, and the float32 logsumexp [B, H, Lq] of the scaled scores; for a query that sees
    nothing, zeros and `MASKED`.
  """
  shape = q.shape
  block_q, block_k, q, k, v, sees, segments = _blocks(
    block_q, block_k, q, k, v, visible, hidden, segments_q, segments_k
  )
  B, K, G, L, E = q.shape
  first_keys = jnp.arange(k.shape[2] // block_k) * block_k

  def query_block(_, i):
    q_i = _take(q, i, block_q, 3)
    sees_i = jax.tree.map(lambda x: x[i], sees)
    count = jnp.cumsum(seen_blocks(sees_i, first_keys, block_k))

    def key_block(step, carry):
      out, total, maximum = carry
      j = jnp.sum(count <= step)  # the block that is seen after as many others
      scores = _scores(q_i, _take(k, j, block_k, 2))
      mask = _mask(sees_i, segments, i, j, block_k)
      scores = jnp.where(mask, scores, MASKED)
      new_maximum = jnp.maximum(maximum, scores.max(-1))
      weights = jnp.where(mask, jnp.exp(scores - new_maximum[..., None]), 0.0)
      decay = jnp.exp(maximum - new_maximum)
      total = total * decay + weights.sum(-1)
      update = _product("bkgqs,bkse->bkgqe", weights.astype(q.dtype), _take(v, j, block_k, 2))
      return out * decay[..., None] + update, total, new_maximum

    shape = (B, K, G, block_q)
    start = jnp.zeros((*shape, E)), jnp.zeros(shape), jnp.full(shape, MASKED)
    # The bound depends on the data: allowed here because the derivative is our own.
    out, total, maximum = jax.lax.fori_loop(0, count[-1], key_block, start)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    logsumexp = jnp.where(some, maximum + jnp.log(total), MASKED)
    return None, ((out / total[..., None]).astype(q.dtype), logsumexp)

  _, (out, logsumexp) = jax.lax.scan(query_block, None, jnp.arange(L // block_q))
  out = jnp.moveaxis(out, 0, 3).reshape(B, K * G, L, E)
  logsumexp = jnp.moveaxis(logsumexp, 0, 3).reshape(B, K * G, L)
  return out[:, :, : shape[2]], logsumexp[:, :, : shape[2]]


def backward(
  q, k, v, visible, segments_q, segments_k, out, logsumexp, d_out, *, hidden=None, block_q=128,
  block_k=256,
):  # fmt: skip
  """(d_q, d_k, d_v), float32, of the part that these keys have in an attention.

  `out` and `logsumexp` are those over all keys, of which these may be a part: the parts add up.
  """
  shapes = q.shape, k.shape
  # Sum over keys of weight * d_weight, which is the same for every key of a query.
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
  block_q, block_k, q, k, v, sees, segments = _blocks(
    block_q, block_k, q, k, v, visible, hidden, segments_q, segments_k
  )
  B, K, G, L, E = q.shape
  d_out = _pad(d_out, 2, L).reshape(q.shape)
  delta, logsumexp = (_pad(x, 2, L).reshape(B, K, G, L) for x in (delta, logsumexp))

  def key_block(d_q, j):
    k_j, v_j = _take(k, j, block_k, 2), _take(v, j, block_k, 2)
    count = jnp.cumsum(seen_blocks(sees, (j * block_k)[None], block_k)[:, 0])

    def query_block(step, carry):
      d_q, d_k, d_v = carry
      i = jnp.sum(count <= step)
      q_i, d_out_i = _take(q, i, block_q, 3), _take(d_out, i, block_q, 3)
      mask = _mask(jax.tree.map(lambda x: x[i], sees), segments, i, j, block_k)
      normaliser = _take(logsumexp, i, block_q, 3)[..., None]
      weights = jnp.where(mask, jnp.exp(_scores(q_i, k_j) - normaliser), 0.0)
      d_v += _product("bkgqs,bkgqe->bkse", weights.astype(q.dtype), d_out_i)
      d_weights = _product("bkgqe,bkse->bkgqs", d_out_i, v_j)
      d_scores = weights * (d_weights - _take(delta, i, block_q, 3)[..., None]) / math.sqrt(E)
      d_scores = d_scores.astype(q.dtype)
      d_k += _product("bkgqs,bkgqe->bkse", d_scores, q_i)
      d_q_i = _take(d_q, i, block_q, 3) + _product("bkgqs,bkse->bkgqe", d_scores, k_j)
      return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, i * block_q, 3), d_k, d_v

    zeros = jnp.zeros(k_j.shape, jnp.float32)
    d_q, d_k, d_v = jax.lax.fori_loop(0, count[-1], query_block, (d_q, zeros, zeros))
    return d_q, (d_k, d_v)

  d_q = jnp.zeros(q.shape, jnp.float32)
  d_q, (d_k, d_v) = jax.lax.scan(key_block, d_q, jnp.arange(k.shape[2] // block_k))
  d_k, d_v = (jnp.moveaxis(d, 0, 2).reshape(k.shape) for d in (d_k, d_v))
  d_q = d_q.reshape(B, K * G, L, E)[:, :, : shapes[0][2]]
  return d_q, d_k[:, :, : shapes[1][2]], d_v[:, :, : shapes[1][2]]


def seen_blocks(sees, first_keys, block_k):
  """Which blocks of keys some query of a block sees.

  Not all between the first and the last key that its queries see: they may be far from each other
  in the sequence (see `context.order`).

  Args:
    sees: (visible, hidden), int32 [..., block_q] or None for hidden.
    first_keys: int32 [columns], of the blocks of keys.
    block_k: keys of a block.

  Returns:
    bool [..., columns].
  """
  visible, hidden = sees
  if hidden is None:
    return visible[..., -1:] > first_keys
  visible, hidden = visible[..., None], hidden[..., None]
  seen = (first_keys < visible) & (hidden < first_keys + block_k) & (hidden < visible)
  return seen.any(-2)


def _blocks(block_q, block_k, q, k, v, visible, hidden, segments_q, segments_k):
  """Pads tokens to whole blocks, and groups query heads by the KV head that they share."""
  B, H, L, E = q.shape
  K = k.shape[1]
  block_q, block_k = min(block_q, L), min(block_k, k.shape[2])
  to_q, to_k = -(-L // block_q) * block_q, -(-k.shape[2] // block_k) * block_k
  visible = jnp.minimum(visible, k.shape[2])  # padded keys stay beyond what is seen
  sees = jax.tree.map(
    lambda x: jnp.pad(x, (0, to_q - L), mode="edge").reshape(-1, block_q), (visible, hidden)
  )
  q = _pad(q, 2, to_q).reshape(B, K, H // K, to_q, E)
  k, v = _pad(k, 2, to_k), _pad(v, 2, to_k)
  segments = None
  if segments_q is not None:
    segments = _pad(segments_q, 1, to_q), _pad(segments_k, 1, to_k)
  return block_q, block_k, q, k, v, sees, segments


def _pad(x, axis, size):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


def _take(x, index, size, axis):
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(q_i, k_j):
  return _product("bkgqe,bkse->bkgqs", q_i, k_j) / math.sqrt(q_i.shape[-1])


def _mask(sees_i, segments, i, j, block_k):
  """[B or 1, 1, 1, block_q, block_k]: which keys of block j the queries of block i see."""
  keys = j * block_k + jnp.arange(block_k)
  visible, hidden = jax.tree.map(lambda x: x[:, None], sees_i)
  mask = (keys < visible)[None]
  if hidden is not None:
    mask = mask & (keys >= hidden)
  if segments is not None:
    of_q, of_k = _take(segments[0], i, len(visible), 1), _take(segments[1], j, block_k, 1)
    mask = mask & (of_q[:, :, None] == of_k[:, None, :])
  return mask[:, None, None]
