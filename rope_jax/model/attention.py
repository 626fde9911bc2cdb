"""Causal attention behind one interface: `dense`, the reference, and `blockwise`.

Shapes: q [B, L, H, E]; k, v [B, L, K, E] with H a multiple of K (grouped queries);
segment_ids [B, L] int32 or None. Scores are scaled by 1/sqrt(E); softmax is in float32.
A token attends to tokens at or before it in the sequence, of its own segment.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rope_jax.model.config import ATTENTION

# Finite, so that exp(masked - maximum) is 0 and never NaN, even where a whole block is masked.
_MASKED = -1e30


def attend(cfg, q, k, v, segment_ids=None):
  """Attention by `cfg.attention`; returns [B, L, H, E] in the dtype of q."""
  if cfg.attention == "dense":
    return checkpoint_name(dense(q, k, v, segment_ids), "attention")
  if cfg.attention == "blockwise":
    return blockwise(q, k, v, segment_ids, block_q=cfg.block_q, block_k=cfg.block_k)
  raise ValueError(f"model.attention must be one of {ATTENTION}, got {cfg.attention!r}")


def dense(q, k, v, segment_ids=None):
  """The reference: all L x L scores at once."""
  mask = None
  if segment_ids is not None:
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def blockwise(q, k, v, segment_ids=None, *, block_q: int = 128, block_k: int = 256):
  """Exact attention with memory linear in L: one block of scores is live at a time.

  Online softmax over blocks of keys, in the forward and in a backward pass of its own, which
  computes the scores again; blocks above the diagonal are never touched. Loops, not unrolled
  code: XLA would schedule unrolled blocks side by side and memory would grow with L^2 again.
  Source: Dao et al., FlashAttention (arXiv 2205.14135); Milakov and Gimelshein (1805.02867).

  Args:
    q, k, v, segment_ids: see the module.
    block_q, block_k: tokens of a block, one a multiple of the other; the sequence is padded to
      a multiple of the larger, or of the smaller if it is shorter than the larger.

  Raises:
    ValueError: if neither block size is a multiple of the other.
  """
  B, L, H, E = q.shape
  K = k.shape[2]
  small, large = sorted((block_q, block_k))
  if large % small:
    raise ValueError(
      f"block_q={block_q} and block_k={block_k}: one must be a multiple of the other"
    )
  tiles = -(-L // small) * small if small < L else L
  block_q, block_k = min(block_q, tiles), min(block_k, tiles)
  padding = -L % max(block_q, block_k)
  if segment_ids is None:
    segment_ids = jnp.zeros((B, L), jnp.int32)
  if padding:
    # Padding comes last, so causality hides it from every real token.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
  # Group query heads by the KV head that they share; heads before tokens, for plain products.
  q = q.reshape(B, L + padding, K, H // K, E).transpose(0, 2, 3, 1, 4)
  k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
  out = _blockwise(block_q, block_k, q, k, v, segment_ids)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, L + padding, H, E)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(block_q, block_k, q, k, v, segment_ids):
  """q [B, K, G, L, E], k and v [B, K, L, E] -> out like q."""
  return _forward(block_q, block_k, q, k, v, segment_ids)[0]


def _forward(block_q, block_k, q, k, v, segment_ids):
  B, K, G, L, E = q.shape

  def query_block(_, i):
    q_i = _take(q, i, block_q, 3)
    segments_i = _take(segment_ids, i, block_q, 1)

    def key_block(j, carry):
      out, total, maximum = carry
      scores = _scores(q_i, _take(k, j, block_k, 2))
      mask = _mask(i, j, segments_i, _take(segment_ids, j, block_k, 1), block_q, block_k)
      scores = jnp.where(mask, scores, _MASKED)
      new_maximum = jnp.maximum(maximum, scores.max(-1))
      weights = jnp.where(mask, jnp.exp(scores - new_maximum[..., None]), 0.0)
      decay = jnp.exp(maximum - new_maximum)
      total = total * decay + weights.sum(-1)
      update = _product("bkgqs,bkse->bkgqe", weights.astype(q.dtype), _take(v, j, block_k, 2))
      return out * decay[..., None] + update, total, new_maximum

    shape = (B, K, G, block_q)
    start = jnp.zeros((*shape, E)), jnp.zeros(shape), jnp.full(shape, _MASKED)
    # The bound depends on i: allowed here because the derivative is our own.
    blocks = ((i + 1) * block_q + block_k - 1) // block_k
    out, total, maximum = jax.lax.fori_loop(0, blocks, key_block, start)
    return None, ((out / total[..., None]).astype(q.dtype), maximum + jnp.log(total))

  _, (out, logsumexp) = jax.lax.scan(query_block, None, jnp.arange(L // block_q))
  out = jnp.moveaxis(out, 0, 3).reshape(q.shape)
  logsumexp = jnp.moveaxis(logsumexp, 0, 3).reshape(B, K, G, L)
  # Named here, where the backward pass takes them: a name on the output outside would keep a copy
  # and still compute both again.
  out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
  return out, (q, k, v, segment_ids, out, logsumexp)


def _backward(block_q, block_k, residuals, d_out):
  q, k, v, segment_ids, out, logsumexp = residuals
  L, E = q.shape[3], q.shape[4]
  # Sum over keys of weight * d_weight, which is the same for every key of a query.
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)

  def key_block(d_q, j):
    k_j, v_j = _take(k, j, block_k, 2), _take(v, j, block_k, 2)
    segments_j = _take(segment_ids, j, block_k, 1)

    def query_block(i, carry):
      d_q, d_k, d_v = carry
      q_i, d_out_i = _take(q, i, block_q, 3), _take(d_out, i, block_q, 3)
      mask = _mask(i, j, _take(segment_ids, i, block_q, 1), segments_j, block_q, block_k)
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
    first = (j * block_k) // block_q
    d_q, d_k, d_v = jax.lax.fori_loop(first, L // block_q, query_block, (d_q, zeros, zeros))
    return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

  d_q = jnp.zeros(q.shape, jnp.float32)
  d_q, (d_k, d_v) = jax.lax.scan(key_block, d_q, jnp.arange(L // block_k))
  d_k, d_v = (jnp.moveaxis(d, 0, 2).reshape(k.shape) for d in (d_k, d_v))
  return d_q.astype(q.dtype), d_k, d_v, None


_blockwise.defvjp(_forward, _backward)


def _take(x, index, size, axis):
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(q_i, k_j):
  return _product("bkgqe,bkse->bkgqs", q_i, k_j) / math.sqrt(q_i.shape[-1])


def _mask(i, j, segments_i, segments_j, block_q, block_k):
  """[B, 1, 1, block_q, block_k]: not later than the query, and of its segment."""
  rows = i * block_q + jnp.arange(block_q)[:, None]
  columns = j * block_k + jnp.arange(block_k)
  same = segments_i[:, :, None] == segments_j[:, None, :]
  return ((columns <= rows) & same)[:, None, None]
