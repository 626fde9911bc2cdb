"""A KV cache of static size, and attention of new tokens to it, on one device or over a mesh.

Sequences of different lengths stand in a batch with padding on their left, so that all are at the
same place and the next token of each is written there. Over a mesh the cache is split like training
splits activations: rows over 'data' and 'fsdp', KV heads over 'tensor', places over 'context',
where each device attends to its own and the parts are put together by their normalisers.

Shape suffixes: N layers, B rows, K KV heads, H query heads, C places, T new tokens, E head_dim.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rope_jax.model import attention, blockwise, context
from rope_jax.model.blockwise import MASKED
from rope_jax.model.config import ModelConfig


class Cache(flax.struct.PyTreeNode):
  """Keys and values of the tokens so far.

  Attributes:
    k, v: [N, B, K, C, E] in the compute dtype; places from `index` on are not yet written.
    padding: int32 [B], places before the first token of each row.
    index: int32, places written.
    rotated: whether keys are stored rotated. If not they are rotated on read, so that a rope that
      depends on the length of the sequence can change under them.
  """

  k: jax.Array
  v: jax.Array
  padding: jax.Array
  index: jax.Array
  rotated: bool = flax.struct.field(pytree_node=False, default=True)

  def new_positions(self, tokens: int) -> jax.Array:
    """int32 [B, tokens]: positions of the next tokens; those of padding are 0."""
    return jnp.maximum(self.index + jnp.arange(tokens) - self.padding[:, None], 0)

  def positions(self) -> jax.Array:
    """int32 [B, C]: positions of all places."""
    return jnp.maximum(jnp.arange(self.k.shape[3]) - self.padding[:, None], 0)


def empty(cfg: ModelConfig, padding: jax.Array, capacity: int, *, rotated: bool = True) -> Cache:
  """A cache with nothing written, split over the mesh that is set, if one is.

  Args:
    cfg: of the model.
    padding: int32 [B].
    capacity: C, places; a multiple of the mesh axis 'context'.
    rotated: as in `Cache`.
  """
  shape = (cfg.num_layers, len(padding), cfg.num_kv_heads, capacity, cfg.head_dim)
  zeros = jnp.zeros(shape, cfg.dtype)
  if attention.mesh_shape():
    zeros = jax.lax.with_sharding_constraint(zeros, P(None, *_heads(len(padding), split=True)))
  return Cache(zeros, zeros, padding, jnp.int32(0), rotated)


def append(cache: Cache, layer: jax.Array, k_BxTxKxE, v_BxTxKxE) -> Cache:
  """Writes the keys and values of a layer's new tokens from `cache.index` on.

  `index` itself is raised once, after the last layer. Over a context, T must divide the places of a
  device and `index` be a multiple of T, so that all of them belong to one device.
  """
  B, T = k_BxTxKxE.shape[:2]
  shards = attention.mesh_shape().get(context.AXIS, 1)
  own = cache.k.shape[3] // shards
  if shards > 1 and own % T:
    raise ValueError(f"{T} new tokens do not divide the {own} places of a device of the context")

  def write(stored, new, layer, index):
    place = index - (jax.lax.axis_index(context.AXIS) * own if shards > 1 else 0)
    start = jnp.clip(place, 0, own - T)
    at = (layer, 0, 0, start, 0)
    new = new.astype(stored.dtype)[None]
    if shards > 1:
      before = jax.lax.dynamic_slice(stored, at, new.shape)
      new = jnp.where(place == start, new, before)
    return jax.lax.dynamic_update_slice(stored, new, at)

  stored, fresh = P(None, *_heads(B, split=True)), _heads(B, split=False)
  write = attention.sharded(write, (stored, fresh, P(), P()), stored)
  k, v = (
    write(old, new.swapaxes(1, 2), layer, cache.index)
    for old, new in ((cache.k, k_BxTxKxE), (cache.v, v_BxTxKxE))
  )
  return cache.replace(k=k, v=v)


def attend(cfg: ModelConfig, cache: Cache, layer: jax.Array, q_BxTxHxE, k_BxKxCxE=None):
  """Attention of the T newest tokens, written from `cache.index` on, to those up to themselves.

  Args:
    cfg: of the model.
    cache: with the keys and values of the tokens themselves.
    layer: int32, of the cache.
    q_BxTxHxE: rotated queries.
    k_BxKxCxE: the layer's keys, rotated, if the cache has them before rotation.

  Returns:
    [B, T, H, E] in the dtype of q. Tokens of padding attend to padding: finite, of no account.
  """
  B, T = q_BxTxHxE.shape[:2]
  shards = attention.mesh_shape().get(context.AXIS, 1)
  own = cache.k.shape[3] // shards
  # One token has no blocks of queries to go through.
  forward = _one if T == 1 else functools.partial(_several, cfg)

  def part(q, keys, k, v, padding, index, layer):
    first = jax.lax.axis_index(context.AXIS) * own if shards > 1 else 0
    queries = index + jnp.arange(T)
    visible, hidden = context.up_to(queries - first, cfg.window)
    padded = padding[:, None]
    of_q, of_k = (x.astype(jnp.int32) for x in (queries < padded, first + jnp.arange(own) < padded))
    stored = (v, layer) if keys is None else (v[layer][None], jnp.int32(0))
    out, logsumexp = forward(
      q, k if keys is None else keys[None], *stored, visible, of_q, of_k, hidden
    )
    if shards == 1:
      return out.astype(q.dtype)
    weight = jnp.exp(logsumexp - jax.lax.pmax(logsumexp, context.AXIS))[..., None]
    total = jax.lax.psum(weight, context.AXIS)
    return (jax.lax.psum(out * weight, context.AXIS) / total).astype(q.dtype)

  whole, split = _heads(B, split=False), _heads(B, split=True)
  layers = P(None, *split)
  part = attention.sharded(part, (whole, split, layers, layers, P(whole[0]), P(), P()), whole)
  given = k_BxKxCxE, cache.k, cache.v, cache.padding, cache.index, layer
  return part(q_BxTxHxE.swapaxes(1, 2), *given).swapaxes(1, 2)


def _several(cfg, q, k, v, layer, visible, of_q, of_k, hidden):
  """(out, logsumexp) of some queries [B, H, T, E], by the kernel of training."""
  N, B, K, C, E = k.shape
  if cfg.attention == "blockwise":
    # Out of the cache itself: the layer is a row of it, and blocks divide it.
    k, v = (x.reshape(N * B, K, C, E) for x in (k, v))
    return blockwise.forward(
      q, k, v, visible, of_q, of_k, hidden=hidden, first_row=layer * B, block_k=_block(C, 512)
    )
  k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
  if cfg.attention == "dense":
    return _dense(q, k, v, visible, of_q, of_k, hidden=hidden)
  # Blocks of training are made for its lengths.
  kernel = attention.kernel(dataclasses.replace(cfg, block_q=0, block_k=0))
  return kernel.forward(q, k, v, visible, of_q, of_k, hidden=hidden)


def _one(q, k, v, layer, visible, of_q, of_k, hidden):
  """(out, logsumexp) of one query a row, [B, H, 1, E].

  Blocks of places that are written, and in the window, are read out of the cache, once; the rest
  of it is not touched, and no copy of a layer is made.
  """
  block = _block(k.shape[3], 2048)
  last = jnp.clip((visible[0] + block - 1) // block, 0, k.shape[3] // block)
  first = 0 if hidden is None else jnp.clip(hidden[0] // block, 0, last)

  def add(i, carry):
    out, logsumexp = carry
    start = i * block
    keys, values = (
      jax.lax.dynamic_slice(x, (layer, 0, 0, start, 0), (1, *x.shape[1:3], block, x.shape[4]))[0]
      for x in (k, v)
    )
    sees = visible - start, None if hidden is None else hidden - start
    places = jax.lax.dynamic_slice_in_dim(of_k, start, block, 1)
    part, of_part = _dense(q, keys, values, sees[0], of_q, places, hidden=sees[1])
    total = jnp.logaddexp(logsumexp, of_part)
    out = out * jnp.exp(logsumexp - total)[..., None]
    return out + part * jnp.exp(of_part - total)[..., None], total

  start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASKED)
  return jax.lax.fori_loop(first, last, add, start)


def _block(places: int, most: int) -> int:
  """The largest power of two up to `most` that divides the places of a cache, or all of them."""
  return min(places & -places, most) if places > most else places


def _dense(q, k, v, visible, segments_q, segments_k, *, hidden=None):
  """As `blockwise.forward`, with all scores at once; out in float32."""
  B, H, T, E = q.shape
  K = k.shape[1]
  q = q.reshape(B, K, H // K, T, E)
  scores = jnp.einsum("bkgte,bkce->bkgtc", q, k, preferred_element_type=jnp.float32) / np.sqrt(E)
  keys = jnp.arange(k.shape[2])
  mask = keys < visible[:, None]
  if hidden is not None:
    mask = mask & (keys >= hidden[:, None])
  mask = mask & (segments_q[:, :, None] == segments_k[:, None, :])
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  maximum = scores.max(-1, keepdims=True)
  weights = jnp.where(mask[:, None, None], jnp.exp(scores - maximum), 0.0)
  total = weights.sum(-1, keepdims=True)
  some = total > 0
  weights = (weights / jnp.where(some, total, 1.0)).astype(q.dtype)
  out = jnp.einsum("bkgtc,bkce->bkgte", weights, v, preferred_element_type=jnp.float32)
  logsumexp = jnp.where(some, maximum + jnp.log(jnp.where(some, total, 1.0)), MASKED)
  return out.reshape(B, H, T, E), logsumexp.reshape(B, H, T)


def _heads(rows: int, *, split: bool) -> P:
  """How [B, heads, places, E] is split; places over the context if `split`."""
  mesh = attention.mesh_shape()
  parts = int(np.prod([mesh.get(axis, 1) for axis in attention.ROWS]))
  return P(attention.ROWS if rows % parts == 0 else None, "tensor", context.AXIS if split else None)
