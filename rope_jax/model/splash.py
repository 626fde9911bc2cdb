"""Splash attention: the Pallas kernel of jax for TPU, behind the shapes of `blockwise`.

What a query sees comes as numbers, not as a mask of the whole sequence: the kernel compares them
with the place of each key, and skips blocks that nothing sees. So one compiled program serves
every shard of a context-parallel sequence.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

from rope_jax.model.blockwise import MASKED, seen_blocks

LANES = 128  # the kernel wants whole vector registers of tokens
# Up to so many blocks of keys, one kernel makes all gradients in five products, where two kernels
# need seven: it keeps a part of the queries' gradient for each block of keys.
FUSED_BLOCKS = 16


def forward(q, k, v, visible, segments_q=None, segments_k=None, *, hidden=None, window=0, block_q=0,
            block_k=0, interpret=False):  # fmt: skip
  """As `blockwise.forward`; block 0: the largest up to 1,024 that the lengths are made of.

  `hidden` is None, or visible - window where there is one: the kernel takes one number a query.
  """
  lengths = q.shape[2], k.shape[2]
  q, k, v, sees, segments, blocks = _prepare(
    q, k, v, visible, hidden, segments_q, segments_k, block_q, block_k, window
  )
  options = _options(blocks, lengths[1], window, interpret)
  seen, _ = _mask_infos(sees, lengths[1], *blocks, window)

  def one(q, k, v, segments):
    attend = kernel.SplashAttentionKernel(seen, None, None, save_residuals=True, **options)
    return attend(q, k, v, segment_ids=segments)

  out, (logsumexp,) = jax.vmap(one, in_axes=(0, 0, 0, None if segments is None else 0))(
    q, k, v, segments
  )
  out, logsumexp = out[:, :, : lengths[0]], logsumexp[:, :, : lengths[0]]
  # The kernel divides by zero where it ran no block, and averages values where all were masked.
  nothing = ~(logsumexp > MASKED)
  return jnp.where(nothing[..., None], 0, out), jnp.where(nothing, MASKED, logsumexp)


def backward(q, k, v, visible, segments_q, segments_k, out, logsumexp, d_out, *, hidden=None,
             window=0, block_q=0, block_k=0, interpret=False):  # fmt: skip
  """As `blockwise.backward`, in the dtype of q."""
  lengths, scale = (q.shape[2], k.shape[2]), 1 / math.sqrt(q.shape[3])
  q, k, v, sees, segments, blocks = _prepare(
    q, k, v, visible, hidden, segments_q, segments_k, block_q, block_k, window
  )
  padding = q.shape[2] - lengths[0]
  out, d_out = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (out, d_out))
  logsumexp = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, padding)))
  options = _options(blocks, lengths[1], window, interpret)
  by_queries, by_keys = _mask_infos(sees, lengths[1], *blocks, window)

  def one(q, k, v, segments, out, logsumexp, d_out):
    residuals = (q, k, v, segments, None, out, logsumexp, by_queries, by_keys)
    # The one private name that we use: the public derivative takes no logsumexp from outside,
    # and keys that are a part of all need that of all. tests/test_attention.py compares it.
    grads = kernel._splash_attention_bwd(save_residuals=False, **options, res=residuals, do=d_out)
    return grads[3:6]

  axes = (0, 0, 0, None if segments is None else 0, 0, 0, 0)
  d_q, d_k, d_v = jax.vmap(one, in_axes=axes)(q, k, v, segments, out, logsumexp, d_out)
  d_q = (d_q[:, :, : lengths[0]].astype(jnp.float32) * scale).astype(q.dtype)
  return d_q, d_k[:, :, : lengths[1]], d_v[:, :, : lengths[1]]


def block_size(name: str, length: int, wanted: int = 0) -> int:
  """The block of a length: `wanted`, or the largest of 1,024, 512, ... that divides it.

  Args:
    name: of the key, 'block_q' or 'block_k'.
    length: tokens that the kernel sees on a device; it is padded to a multiple of 128.
    wanted: config.model.NAME; 0: chosen here.

  Raises:
    ValueError: if `wanted` is not a multiple of 128 that divides the length.
  """
  length = -(-length // LANES) * LANES
  if not wanted:
    return next(b for b in (1024, 512, 256, LANES) if length % b == 0)
  if wanted % LANES or length % wanted:
    raise ValueError(
      f"config.model.{name}={wanted}: expected 0 or a multiple of {LANES} that divides the "
      f"{length:,} tokens that splash attention sees on a device"
    )
  return wanted


def _prepare(q, k, v, visible, hidden, segments_q, segments_k, block_q, block_k, window):
  """Scales queries, which the kernel does not, and pads tokens to whole registers."""
  if (hidden is None) != (window == 0):
    raise ValueError(f"splash attention: window={window} wants hidden = visible - window")
  q = (q.astype(jnp.float32) / math.sqrt(q.shape[3])).astype(q.dtype)
  to_q, to_k = (-x.shape[2] % LANES for x in (q, k))
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, 0), (0, by), (0, 0))) for x, by in ((q, to_q), (k, to_k), (v, to_k))
  )
  sees = jax.tree.map(lambda x: jnp.pad(x, (0, to_q), mode="edge"), (visible, hidden))
  segments = None
  if segments_q is not None:
    segments = kernel.SegmentIds(
      jnp.pad(segments_q, ((0, 0), (0, to_q)), mode="edge"),
      jnp.pad(segments_k, ((0, 0), (0, to_k)), mode="edge"),
    )
  blocks = (
    block_size("block_q", q.shape[2], block_q),
    block_size("block_k", k.shape[2], block_k),
  )
  return q, k, v, sees, segments, blocks


def _options(blocks, keys, window, interpret) -> dict:
  q, k = blocks
  fused = -(-keys // k) <= FUSED_BLOCKS
  sizes = kernel.BlockSizes(
    block_q=q,
    block_kv=k,
    block_q_dkv=q,
    block_kv_dkv=k,
    use_fused_bwd_kernel=fused,
    **({} if fused else dict(block_q_dq=q, block_kv_dq=k)),
  )
  return dict(
    block_sizes=sizes,
    is_mqa=False,
    mask_value=kernel.DEFAULT_MASK_VALUE,
    mask_function=_sees(keys, window),
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    interpret=interpret,
  )


@functools.cache  # a function is a static argument of the kernel: a new one would compile again
def _sees(keys, window):
  """Whether a query sees a key, by the place of its last one; those from `keys` on are padding."""

  def sees(last_key, key):
    seen = last_key >= key
    if keys % LANES:
      seen &= key < keys
    return seen & (last_key - key < window) if window else seen

  return sees


def _mask_infos(sees, keys, block_q, block_k, window):
  """Blocks to compute and, for steps without one, which to fetch meanwhile: by queries, by keys.

  With a window there are only as many steps as there can be blocks, for each block of queries and,
  unless one kernel makes all gradients, for each block of keys. A step without a block names the
  next that is computed, so that nothing is fetched for nothing.
  """
  columns = -(-keys // block_k)
  visible, hidden = sees
  sees = jax.tree.map(lambda x: x.reshape(-1, block_q), (jnp.minimum(visible, keys), hidden))
  some = seen_blocks(sees, jnp.arange(columns) * block_k, block_k)
  wide, high = columns, len(some)
  if window:
    # A block of queries is one run of tokens or two (`context.order`), each of which sees one run
    # of keys; those that see a block of keys are one run. A run of n may touch one block more than
    # it fills.
    wide = (block_q + 2 * window - 6) // block_k + 4
    if columns > FUSED_BLOCKS:  # a kernel that makes all gradients has a step for each block
      high = (block_k + window - 3) // block_q + 2
  by_queries = _steps(some, wide)
  by_keys = [x.T for x in _steps(some.T, high)]
  return tuple(
    info.MaskInfo(
      data_next=block.astype(jnp.int32)[None],
      mask_next=None,
      block_mask=computed.astype(jnp.int32)[None],
      partial_mask_blocks=None,
      q_sequence=(visible - 1).astype(jnp.int32),
    )
    for block, computed in (by_queries, by_keys)
  )


def _steps(some, most):
  """Which block each step is for, and whether it is computed; [rows, at most `most`] both.

  Args:
    some: bool [rows, columns], blocks to compute.
    most: of a row.
  """
  first = jnp.argmax(some, axis=1)
  columns = some.shape[1]
  if most < columns:
    count = jnp.cumsum(some, axis=1)
    block = jnp.sum(count[:, None] <= np.arange(most)[:, None], axis=2)
    computed = block < columns
  else:
    block, computed = np.arange(columns), some
  following = jnp.where(block < first[:, None], first[:, None], jnp.roll(first, -1)[:, None])
  return jnp.where(computed, block, following), computed
