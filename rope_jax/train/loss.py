"""Cross entropy in chunks along the sequence.

Float32 logits of 65,536 tokens and a vocabulary of 128k are 32 GiB; those of a chunk are not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_losses(hidden_BxLxD, unembedding_DxV, targets_BxL, chunk: int) -> jax.Array:
  """Negative log-likelihood of each target, float32 [B, L], in nats.

  Args:
    hidden_BxLxD: final hidden states.
    unembedding_DxV: matrix to logits, cast to the dtype of the hidden states.
    targets_BxL: int32 token ids.
    chunk: tokens whose logits exist at a time, in the forward and in the backward pass.
  """
  B, L, D = hidden_BxLxD.shape
  chunk = min(chunk, L)
  padding = -L % chunk
  hidden = jnp.pad(hidden_BxLxD, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets_BxL, ((0, 0), (0, padding)))
  unembedding_DxV = unembedding_DxV.astype(hidden.dtype)

  @jax.checkpoint  # keep the hidden states of a chunk, not its logits
  def one(hidden_BxCxD, targets_BxC):
    logits_BxCxV = jnp.einsum(
      "bcd,dv->bcv", hidden_BxCxD, unembedding_DxV, preferred_element_type=jnp.float32
    )
    target_logits = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxCxV, axis=-1) - target_logits

  chunks = (L + padding) // chunk
  hidden = hidden.reshape(B, chunks, chunk, D).swapaxes(0, 1)
  targets = targets.reshape(B, chunks, chunk).swapaxes(0, 1)
  losses = jax.lax.map(lambda x: one(*x), (hidden, targets))
  return losses.swapaxes(0, 1).reshape(B, L + padding)[:, :L]
