"""The most likely token in chunks along the sequence, over a vocabulary that may be split.

As in rope_jax/train/loss.py, so that the logits of all tokens never exist at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rope_jax.model.attention import ROWS
from rope_jax.model.context import AXIS as CONTEXT


def most_likely(hidden_BxLxD, unembedding_DxV, chunk: int) -> jax.Array:
  """The argmax of the logits, int32 [B, L]; of equal ones the first.

  Over a mesh (`jax.set_mesh`), each device has its rows and tokens, and its part of the vocabulary
  where the axis 'tensor' splits it, which must divide it.

  Args:
    hidden_BxLxD: final hidden states.
    unembedding_DxV: matrix to logits, cast to the dtype of the hidden states.
    chunk: tokens of a row whose logits exist at a time.
  """
  mesh = dict(jax.sharding.get_abstract_mesh().shape)
  if not mesh:
    return _chunked(hidden_BxLxD, unembedding_DxV, chunk, 1)
  parts, rows = mesh["tensor"], mesh["data"] * mesh["fsdp"]
  tokens = P(ROWS if hidden_BxLxD.shape[0] % rows == 0 else None, CONTEXT)
  return jax.shard_map(
    lambda *x: _chunked(*x, chunk, parts),
    in_specs=(tokens, P(None, "tensor" if parts > 1 else None)),
    out_specs=tokens,
  )(hidden_BxLxD, unembedding_DxV)


def _chunked(hidden_BxLxD, unembedding_DxV, chunk, parts):
  """The predictions of a device, which has one of the equal parts of the vocabulary."""
  B, L, D = hidden_BxLxD.shape
  V = unembedding_DxV.shape[1]
  chunk = min(chunk, L)
  padding = -L % chunk
  matrix_DxV = unembedding_DxV.astype(hidden_BxLxD.dtype)

  def one(hidden_BxCxD):
    logits_BxCxV = jnp.einsum(
      "bcd,dv->bcv", hidden_BxCxD, matrix_DxV, preferred_element_type=jnp.float32
    )
    best_BxC = jnp.argmax(logits_BxCxV, axis=-1).astype(jnp.int32)
    if parts == 1:
      return best_BxC
    maximum_BxC = logits_BxCxV.max(-1)
    ours = maximum_BxC == jax.lax.pmax(maximum_BxC, "tensor")
    best_BxC += V * jax.lax.axis_index("tensor")
    return jax.lax.pmin(jnp.where(ours, best_BxC, V * parts), "tensor")

  hidden = jnp.pad(hidden_BxLxD, ((0, 0), (0, padding), (0, 0)))
  hidden = hidden.reshape(B, (L + padding) // chunk, chunk, D).swapaxes(0, 1)
  return jax.lax.map(one, hidden).swapaxes(0, 1).reshape(B, L + padding)[:, :L]
