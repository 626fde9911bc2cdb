"""Causal attention behind one interface, on one device or over a mesh.

Shapes: q [B, L, H, E]; k, v [B, L, K, E] with H a multiple of K (grouped queries);
segment_ids [B, L] int32 or None. Scores are scaled by 1/sqrt(E); softmax is in float32.
A token attends to tokens at or before it in the sequence, of its own segment; with a window, to the
last `window` of them, itself included: those whose number is above its own less `window`, as in
Hugging Face's `sliding_window`.

Over a mesh (`jax.set_mesh`), rows are split over 'data' and 'fsdp', heads over 'tensor' and tokens
over 'context', where they stand in the order of `places`. `dense`, the reference, leaves it to the
compiler; the other kernels say what each device does.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from rope_jax.model import blockwise, context
from rope_jax.model.config import ATTENTION

ROWS = ("data", "fsdp")  # mesh axes over which the rows of a batch are split
# Splash compares one number a query with the place of a key; in a ring, keys are of two chunks.
NO_RING = (
  "config.model.context_parallel='ring': expected 'all_gather' where config.model.attention is "
  "splash and config.model.window is not 0"
)


@jax.named_scope("attend")  # scopes are what `train.profile` tells operations by
def attend(cfg, q, k, v, segment_ids=None):
  """Attention by `cfg.attention`; returns [B, L, H, E] in the dtype of q.

  Raises:
    ValueError: if the mesh does not divide the heads or the tokens.
  """
  if cfg.attention not in ATTENTION:
    raise ValueError(f"model.attention must be one of {ATTENTION}, got {cfg.attention!r}")
  if cfg.attention == "dense":
    out = dense(q, k, v, segment_ids, places=places(cfg, q.shape[1]), window=cfg.window)
    return checkpoint_name(out, "attention")
  places(cfg, q.shape[1])  # refuses what cannot be split
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  return _attention(cfg, q, k, v, segment_ids).swapaxes(1, 2)


def places(cfg, length: int) -> np.ndarray:
  """Which token stands at each place of a sequence on this mesh (see `context.order`)."""
  shards = mesh_shape().get(context.AXIS, 1)
  return context.order(length, shards, cfg.load_balance)


def arrange(cfg, batch):
  """A tree of arrays [B, L, ...] in the order of the sequence, in that of `places`."""
  length = jax.tree.leaves(batch)[0].shape[1]
  order = places(cfg, length)
  in_order = (order == np.arange(length)).all()
  return batch if in_order else jax.tree.map(lambda x: x[:, order], batch)


def dense(q, k, v, segment_ids=None, places=None, window=0):
  """The reference: all L x L scores at once. `places`: numbers of the tokens, if not in order."""
  places = np.arange(q.shape[1]) if places is None else places
  if (np.diff(places) > 0).all() and not window:
    mask = None
    if segment_ids is not None:
      mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
  before = places[:, None] - places
  mask = jnp.asarray((before >= 0) & (before < (window or len(places))))[None, None]
  if segment_ids is not None:
    mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(cfg, q, k, v, segment_ids):
  """q [B, H, L, E], k and v [B, K, L, E] -> out like q, by the kernel and the mesh."""
  return _forward(cfg, q, k, v, segment_ids)[0]


def _forward(cfg, q, k, v, segment_ids):
  plan, heads, numbers, segments = _plan(cfg, q, k)
  forward = sharded(plan.forward, (heads, heads, heads, segments), (heads, numbers))
  out, logsumexp = forward(q, k, v, segment_ids)
  # Named here, where the backward pass takes them: a name on the output outside would keep a copy
  # and still compute both again.
  out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
  return out, (q, k, v, segment_ids, out, logsumexp)


def _backward(cfg, residuals, d_out):
  q, k, v, segment_ids, out, logsumexp = residuals
  plan, heads, numbers, segments = _plan(cfg, q, k)
  inputs = (heads, heads, heads, segments, heads, numbers, heads)
  backward = sharded(plan.backward, inputs, (heads, heads, heads))
  d_q, d_k, d_v = backward(q, k, v, segment_ids, out, logsumexp, d_out)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _plan(cfg, q, k):
  """The kernel of a device, and how heads [B, H, L, E], [B, H, L] and segments are split."""
  mesh = mesh_shape()
  rows = int(np.prod([mesh.get(axis, 1) for axis in ROWS]))
  tensor, shards = mesh.get("tensor", 1), mesh.get(context.AXIS, 1)
  if k.shape[1] % tensor:
    raise ValueError(
      f"config.mesh.tensor={tensor} does not divide config.model.num_kv_heads={k.shape[1]}"
    )
  if shards == 1:
    plan = context.alone(kernel(cfg), cfg.window)
  else:
    if cfg.window and cfg.context_parallel == "ring" and "splash" in cfg.attention:
      raise ValueError(NO_RING)
    strategy = dict(all_gather=context.all_gather, ring=context.ring)[cfg.context_parallel]
    plan = strategy(kernel(cfg), shards, cfg.load_balance, cfg.window)
  batch = ROWS if q.shape[0] % rows == 0 else None  # too few to split: each device has them all
  heads = P(batch, "tensor", context.AXIS)
  return plan, heads, heads, P(batch, context.AXIS)


def kernel(cfg) -> context.Kernel:
  """The kernel of one device by `cfg.attention`, which must not be 'dense'."""
  blocks = dict(block_q=cfg.block_q, block_k=cfg.block_k)
  if cfg.attention == "blockwise":
    blocks = {name: size for name, size in blocks.items() if size}
    module = blockwise
  else:
    from rope_jax.model import splash as module  # Pallas for TPU: slow to import

    blocks |= dict(interpret=cfg.attention == "splash_interpret", window=cfg.window)
  return context.Kernel(
    functools.partial(module.forward, **blocks), functools.partial(module.backward, **blocks)
  )


def sharded(function, in_specs, out_specs):
  """`jax.shard_map` over the mesh that is set, or the function itself."""
  if not mesh_shape():
    return function
  # Pallas calls do not say over which axes their results vary, hence no check of that.
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mesh_shape() -> dict:
  """Sizes of the axes of the mesh that is set (`jax.set_mesh`), by name; empty without one."""
  return dict(jax.sharding.get_abstract_mesh().shape)
