"""Blockwise attention in plain JAX, for any backend: memory linear in the length.

Online softmax over blocks of keys, in the forward and in a backward pass that computes the scores
again. One tile lives at a time, a block of queries of all heads that share a KV head against a
block of keys: loops, not unrolled code, which XLA would schedule side by side, so that memory would
grow with L^2 again. A tile that no query sees, by order, window or segment, is never touched; one
that all queries see is not masked.
Source: Dao et al., FlashAttention (arXiv 2205.14135); Milakov and Gimelshein (1805.02867).

Shapes: q [B, H, Lq, E]; k, v [B, K, Lk, E] with H a multiple of K (grouped queries); visible and
hidden [Lq] int32, not decreasing: query t sees the first visible[t] keys (all, if there are fewer)
but for the first hidden[t], if given; segments_q [B, Lq], segments_k [B, Lk] or both None: of those
keys, only the ones of its segment. block_q and block_k are tokens of a block; 0: by the shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that exp(masked - maximum) is 0 and never NaN, even where a whole block is masked:
# maxima start above all that is masked, and below any score.
MASKED = -1e30
_LEAST = MASKED / 10


def forward(
  q,
  k,
  v,
  visible,
  segments_q=None,
  segments_k=None,
  *,
  hidden=None,
  block_q=0,
  block_k=0,
  first_row=0,
):
  """Attention and its normaliser.

  k and v may have more rows than q: those from `first_row` on are of account.

  Returns:
    out like q, and the float32 logsumexp [B, H, Lq] of the scaled scores; for a query that sees
    nothing, zeros and `MASKED`.
  """
  length, dtype = q.shape[2], q.dtype
  q, k, v, mask = _tiled(q, k, v, visible, hidden, segments_q, segments_k, block_q, block_k)
  (B, K, G, _, E), (rows, block_q) = q.shape, mask.visible.shape
  order, whole, seen = _order(mask)
  scale = 1 / math.sqrt(E)

  def queries(_, tile):
    b, h, i = tile
    q_i = _rows(q, b, h, i, block_q)

    def keys(masked, step, carry):
      out, total, maximum = carry
      j = _at(order, b, i, step)
      scores = _masked(
        _product("qe,se->qs", q_i, _at(k, first_row + b, h, j)), mask, b, i, j, masked
      )
      new_maximum = jnp.maximum(maximum, scores.max(-1))
      weights = jnp.exp((scores - new_maximum[:, None]) * scale)
      decay = jnp.exp((maximum - new_maximum) * scale)
      total = total * decay + weights.sum(-1)
      update = _product("qs,se->qe", weights.astype(dtype), _at(v, first_row + b, h, j))
      return out * decay[:, None] + update, total, new_maximum

    zeros = jnp.zeros(q_i.shape, jnp.float32)
    carry = zeros, zeros[:, 0], jnp.full_like(zeros[:, 0], _LEAST)
    out, total, maximum = _loop(keys, _at(whole, b, i), _at(seen, b, i), carry)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    logsumexp = jnp.where(some, maximum * scale + jnp.log(total), MASKED)
    return None, ((out / total[:, None]).astype(dtype), logsumexp)

  _, (out, logsumexp) = jax.lax.scan(queries, None, _every(B, K, rows))
  out, logsumexp = (
    jnp.moveaxis(x.reshape(B, K, rows, G, block_q, *x.shape[2:]), 2, 3) for x in (out, logsumexp)
  )
  out = out.reshape(B, K * G, rows * block_q, E)
  return out[:, :, :length], logsumexp.reshape(out.shape[:3])[:, :, :length]


def backward(
  q, k, v, visible, segments_q, segments_k, out, logsumexp, d_out, *, hidden=None, block_q=0,
  block_k=0,
):  # fmt: skip
  """(d_q, d_k, d_v), float32, of the part that these keys have in an attention.

  `out` and `logsumexp` are those over all keys, of which these may be a part: the parts add up.
  """
  lengths, heads, dtype = (q.shape[2], k.shape[2]), q.shape[1], q.dtype
  # Sum over keys of weight * d_weight, which is the same for every key of a query. As a product:
  # XLA's sum of so short rows takes forty times as long on CPU.
  delta = jnp.einsum(
    "bhqe,bhqe->bhq", d_out, out, precision="highest", preferred_element_type=jnp.float32
  )
  # Of a query that sees nothing, all weights are exp(MASKED - 0) = 0.
  logsumexp = jnp.where(logsumexp > _LEAST, logsumexp, 0.0)
  q, k, v, mask = _tiled(q, k, v, visible, hidden, segments_q, segments_k, block_q, block_k)
  (B, K, G, _, E), (rows, block_q) = q.shape, mask.visible.shape
  columns, block_k = k.shape[2:4]
  d_out, delta, logsumexp = (_grouped(x, K, rows * block_q) for x in (d_out, delta, logsumexp))
  order, whole, seen = _order(mask, by_keys=True)
  scale = 1 / math.sqrt(E)

  def head(_, tile):
    b, h = tile

    # Gradients of keys are made with their channels first: a product over the rows of two arrays
    # is fast if the small one stands on the left.
    def keys(d_q, j):
      k_j, v_j = _at(k, b, h, j), _at(v, b, h, j)

      def queries(masked, step, carry):
        d_q, d_k, d_v = carry
        i = _at(order, b, j, step)
        q_i, d_out_i, normaliser, delta_i = (
          _rows(x, b, h, i, block_q) for x in (q, d_out, logsumexp, delta)
        )
        scores = _masked(_product("qe,se->qs", q_i, k_j), mask, b, i, j, masked)
        weights = jnp.exp(scores * scale - normaliser[:, None])
        d_v += _product("qe,qs->es", d_out_i, weights.astype(dtype))
        d_weights = _product("qe,se->qs", d_out_i, v_j)
        d_scores = (weights * (d_weights - delta_i[:, None])).astype(dtype)
        d_k += _product("qe,qs->es", q_i, d_scores)
        d_q_i = _at(d_q, i) + _product("qs,se->qe", d_scores, k_j)
        return jax.lax.dynamic_update_index_in_dim(d_q, d_q_i, i, 0), d_k, d_v

      zeros = jnp.zeros((E, block_k), jnp.float32)
      d_q, d_k, d_v = _loop(queries, _at(whole, b, j), _at(seen, b, j), (d_q, zeros, zeros))
      return d_q, (d_k.T * scale, d_v.T)

    d_q = jnp.zeros((rows, G * block_q, E), jnp.float32)
    d_q, d_kv = jax.lax.scan(keys, d_q, jnp.arange(columns))
    d_q = d_q.reshape(rows, G, block_q, E).swapaxes(0, 1) * scale
    return None, (d_q.reshape(G, rows * block_q, E), *d_kv)

  _, (d_q, d_k, d_v) = jax.lax.scan(head, None, _every(B, K))
  d_q = d_q.reshape(B, heads, rows * block_q, E)
  d_k, d_v = (x.reshape(B, K, columns * block_k, E)[:, :, : lengths[1]] for x in (d_k, d_v))
  return d_q[:, :, : lengths[0]], d_k, d_v


class _Mask(NamedTuple):
  """What queries see, by blocks of queries [rows, block_q] and of keys [columns, block_k]."""

  visible: jax.Array
  hidden: jax.Array | None
  segments_q: jax.Array | None  # [B, rows, block_q]
  segments_k: jax.Array | None
  first_keys: jax.Array  # [columns]
  block_k: int


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


def _order(mask: _Mask, by_keys: bool = False):
  """The tiles of each block of queries, or of keys: those that need no mask, then those that do.

  Returns:
    int32 (order [B, rows, columns], whole [B, rows], seen [B, rows]): numbers of blocks of keys,
    how many of them are seen by all queries, and how many by any, those included; B is 1 without
    segments.
  """
  last_keys = mask.first_keys + mask.block_k
  seen = seen_blocks((mask.visible, mask.hidden), mask.first_keys, mask.block_k)[None]
  whole = (mask.visible[:, :1] >= last_keys)[None]
  if mask.hidden is not None:
    whole = whole & (mask.hidden[:, -1:] <= mask.first_keys)
  if mask.segments_q is not None:
    (low_q, high_q), (low_k, high_k) = (
      (x.min(-1), x.max(-1)) for x in (mask.segments_q, mask.segments_k)
    )
    low_q, high_q = low_q[:, :, None], high_q[:, :, None]
    low_k, high_k = low_k[:, None], high_k[:, None]
    seen = seen & (low_q <= high_k) & (low_k <= high_q)
    whole = whole & (low_q == high_k) & (low_k == high_q)
  if by_keys:
    seen, whole = seen.swapaxes(1, 2), whole.swapaxes(1, 2)
  kind = 2 - seen.astype(jnp.int32) - whole
  counts = (x.sum(-1, dtype=jnp.int32) for x in (whole, seen))
  return jnp.argsort(kind, axis=-1, stable=True), *counts


def _loop(step, whole, seen, carry):
  """step(masked, number, carry) for `whole` tiles without a mask, and for those up to `seen`."""
  # The bounds depend on the data: allowed here because the derivative is our own.
  carry = jax.lax.fori_loop(0, whole, lambda n, carry: step(False, n, carry), carry)
  return jax.lax.fori_loop(whole, seen, lambda n, carry: step(True, n, carry), carry)


def _masked(scores, mask: _Mask, b, i, j, masked):
  """Scores [G * block_q, block_k] of blocks i and j, `MASKED` where a query does not see a key."""
  if not masked:
    return scores
  keys = _at(mask.first_keys, j) + jnp.arange(mask.block_k)
  sees = keys < _at(mask.visible, i)[:, None]
  if mask.hidden is not None:
    sees = sees & (keys >= _at(mask.hidden, i)[:, None])
  if mask.segments_q is not None:
    sees = sees & (_at(mask.segments_q, b, i)[:, None] == _at(mask.segments_k, b, j))
  return jnp.where(sees, scores.reshape(-1, *sees.shape), MASKED).reshape(scores.shape)


def _tiled(q, k, v, visible, hidden, segments_q, segments_k, block_q, block_k):
  """Tokens in whole blocks: (q [B, K, G, L, E], k and v [B, K, columns, block_k, E], mask)."""
  B, K, length_k, E = k.shape
  block_q, block_k = block_sizes(q.shape[1] // K, q.shape[2], length_k, block_q, block_k)

  def blocks(x, axis, size, mode="edge"):
    x = _pad(x, axis, -(-x.shape[axis] // size) * size, mode)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])

  visible = jnp.minimum(visible, length_k)  # padded keys stay beyond what is seen
  visible, hidden = jax.tree.map(lambda x: blocks(x, 0, block_q), (visible, hidden))
  segments_q, segments_k = (
    None if x is None else blocks(x, 1, size)
    for x, size in ((segments_q, block_q), (segments_k, block_k))
  )
  k, v = (blocks(x, 2, block_k, "constant") for x in (k, v))
  first_keys = jnp.arange(k.shape[2]) * block_k
  mask = _Mask(visible, hidden, segments_q, segments_k, first_keys, block_k)
  return _grouped(q, K, visible.size), k, v, mask


def block_sizes(group, length_q, length_k, block_q=0, block_k=0):
  """(block_q, block_k): as given, or of a tile that fills the products and stays in cache.

  Args:
    group: query heads of a KV head.
    length_q, length_k: tokens.
    block_q, block_k: tokens of a block; 0: to be chosen.
  """
  if not block_q:
    block_q = min(_power(2048 // group), max(_power(length_q // 8), 128))
  return min(block_q, length_q), min(block_k or 512, length_k)


def _power(n):
  """The largest power of two up to n, at least 1."""
  return 1 << (max(n, 1).bit_length() - 1)


def _grouped(x, K, length):
  """[B, H, L, ...] -> [B, K, G, length, ...]: heads by the KV head that they share, zeros added."""
  return _pad(x, 2, length).reshape(x.shape[0], K, -1, length, *x.shape[3:])


def _every(*sizes):
  """The indices of an array of these sizes, each [product of sizes] int32, the last fastest."""
  return tuple(x.reshape(-1) for x in jnp.indices(sizes, dtype=jnp.int32))


def _rows(x, b, h, i, block_q):
  """Block i of the queries of all heads of a group: [G * block_q, ...]."""
  start = (b, h, 0, i * block_q, *(0,) * (x.ndim - 4))
  part = jax.lax.dynamic_slice(x, start, (1, 1, x.shape[2], block_q, *x.shape[4:]))
  return part.reshape(-1, *x.shape[4:])


def _at(x, *index):
  """x[index] for numbers that are not negative; the first of an axis of one."""
  index = [0 if size == 1 else i for i, size in zip(index, x.shape)]
  rest = x.shape[len(index) :]
  start = (*index, *(0,) * len(rest))
  return jax.lax.dynamic_slice(x, start, (*(1,) * len(index), *rest)).reshape(rest)


def _pad(x, axis, size, mode="constant"):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, mode=mode)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
