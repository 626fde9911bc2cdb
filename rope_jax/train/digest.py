"""Checksums of arrays wherever they are: any change of one bit changes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def digest(tree) -> dict[str, list[int]]:
  """Two 32-bit checksums of each array in a tree, by its path.

  They are sums of whole numbers modulo 2^32, so that they are the same however an array is split
  over devices, and nothing is gathered. Each entry is multiplied by odd numbers that depend on its
  place: a flipped bit never leaves a sum as it was, and entries that change places hardly ever do.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  sums = jax.device_get(_digests([leaf for _, leaf in leaves]))
  return {
    jax.tree_util.keystr(path): [int(x) for x in pair]
    for (path, _), pair in zip(leaves, sums, strict=True)
  }


@jax.jit
def _digests(leaves: list) -> list:
  return [_digest(x) for x in leaves]


def _digest(x) -> jax.Array:
  x = jnp.asarray(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    place = place * jnp.uint32(x.shape[axis] % 2**32)
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  first = place * np.uint32(0x9E3779B2) + 1
  second = (place ^ (place >> 15)) * np.uint32(0x85EBCA6A) | 1
  return jnp.stack([jnp.sum(bits * w, dtype=jnp.uint32) for w in (first, second)])
