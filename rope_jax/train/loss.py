"""Cross entropy in chunks along the sequence, over a vocabulary that may be split.

Float32 logits of 65,536 tokens and a vocabulary of 128k are 32 GiB; those of a chunk are not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rope_jax.model.attention import ROWS
from rope_jax.model.context import AXIS as CONTEXT


@jax.named_scope("loss")
def token_losses(hidden_BxLxD, unembedding_DxV, targets_BxL, chunk: int) -> jax.Array:
  """Negative log-likelihood of each target, float32 [B, L], in nats.

  Over a mesh (`jax.set_mesh`), each device has its rows and tokens, and its part of the vocabulary
  where the axis 'tensor' splits it.

  Args:
    hidden_BxLxD: final hidden states.
    unembedding_DxV: matrix to logits, cast to the dtype of the hidden states.
    targets_BxL: int32 token ids.
    chunk: tokens of a row whose logits exist at a time, in the forward and in the backward pass.

  Raises:
    ValueError: if the mesh does not divide the vocabulary.
  """
  mesh = dict(jax.sharding.get_abstract_mesh().shape)
  if not mesh:
    return _chunked(hidden_BxLxD, unembedding_DxV, targets_BxL, chunk, 1)
  parts, rows = mesh["tensor"], mesh["data"] * mesh["fsdp"]
  if unembedding_DxV.shape[1] % parts:
    raise ValueError(
      f"config.mesh.tensor={parts} does not divide config.model.vocab_size="
      f"{unembedding_DxV.shape[1]}"
    )
  tokens = P(ROWS if hidden_BxLxD.shape[0] % rows == 0 else None, CONTEXT)
  return jax.shard_map(
    lambda *x: _chunked(*x, chunk, parts),
    in_specs=(tokens, P(None, "tensor" if parts > 1 else None), tokens),
    out_specs=tokens,
  )(hidden_BxLxD, unembedding_DxV, targets_BxL)


def _chunked(hidden_BxLxD, unembedding_DxV, targets_BxL, chunk, parts):
  """The losses of a device, which has one of the equal parts of the vocabulary."""
  B, L, D = hidden_BxLxD.shape
  V = unembedding_DxV.shape[1]
  chunk = min(chunk, L)
  padding = -L % chunk
  hidden = jnp.pad(hidden_BxLxD, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets_BxL, ((0, 0), (0, padding)))
  first = V * jax.lax.axis_index("tensor") if parts > 1 else 0

  @jax.checkpoint  # keep the hidden states of a chunk, not its logits
  def one(hidden_BxCxD, targets_BxC):
    # Cast here, so that the gradients of the chunks are summed in the dtype of the parameters.
    matrix_DxV = unembedding_DxV.astype(hidden_BxCxD.dtype)
    logits_BxCxV = jnp.einsum(
      "bcd,dv->bcv", hidden_BxCxD, matrix_DxV, preferred_element_type=jnp.float32
    )
    if parts == 1:
      own_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
      return _logsumexp(logits_BxCxV) - own_BxC
    maximum = jax.lax.pmax(jax.lax.stop_gradient(logits_BxCxV.max(-1)), "tensor")
    total = jax.lax.psum(jnp.exp(logits_BxCxV - maximum[..., None]).sum(-1), "tensor")
    here = targets_BxC - first
    ours = (here >= 0) & (here < V)
    own_BxC = jnp.take_along_axis(logits_BxCxV, jnp.where(ours, here, 0)[..., None], axis=-1)
    own_BxC = jax.lax.psum(jnp.where(ours, own_BxC[..., 0], 0.0), "tensor")
    return maximum + jnp.log(total) - own_BxC

  chunks = (L + padding) // chunk
  hidden = hidden.reshape(B, chunks, chunk, D).swapaxes(0, 1)
  targets = targets.reshape(B, chunks, chunk).swapaxes(0, 1)
  losses = jax.lax.map(lambda x: one(*x), (hidden, targets))
  return losses.swapaxes(0, 1).reshape(B, L + padding)[:, :L]


@jax.custom_vjp
def _logsumexp(x):
  """log(sum(exp(x))) over the last axis, finite.

  As `jax.nn.logsumexp`, but on CPU, where XLA is slow at a sum whose terms it makes on the way
  (jax 0.10.2: six times the time), the terms are made first, and summed by a product.
  """
  maximum = x.max(-1)
  terms = jnp.exp(x - maximum[..., None])

  def product(terms):
    return jnp.matmul(terms, jnp.ones(terms.shape[-1], terms.dtype), precision="highest")

  total = jax.lax.platform_dependent(terms, cpu=product, default=lambda terms: terms.sum(-1))
  return maximum + jnp.log(total)


def _logsumexp_forward(x):
  out = _logsumexp(x)
  return out, (x, out)


def _logsumexp_backward(kept, d_out):
  x, out = kept
  return (jnp.exp(x - out[..., None]) * d_out[..., None],)


_logsumexp.defvjp(_logsumexp_forward, _logsumexp_backward)
