"""The rotation of queries and keys by the angles of their positions.

Reference: Su et al., RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
  """Rotates each pair of channels by its angle, in float32.

  Args:
    x: [..., tokens, heads, head_dim] queries or keys.
    cos, sin: [..., tokens, pairs] from `cos_sin`, or [..., tokens, groups, pairs] with angles of
      their own for equal groups of heads. With fewer pairs than half the channels, the first
      2 * pairs are rotated and the rest pass through (partial rotary).
    interleaved: pairs are channels (2i, 2i+1) as in RoFormer and GGUF files, instead of
      (i, i + pairs), the half-split layout of Hugging Face checkpoints.

  Returns:
    The rotated array, with the shape and dtype of x.

  Raises:
    ValueError: if there are more pairs than channels, or groups do not divide the heads.
  """
  angles = by_channel(cos, sin, interleaved=interleaved)
  return rotate_channels(x, *angles, interleaved=interleaved)


def by_channel(cos: jax.Array, sin: jax.Array, *, interleaved: bool = False):
  """What each channel and its partner are multiplied by: (cos, sin with its sign), [..., 2 pairs].

  For `rotate_channels`: made once where many layers rotate by the same angles.
  """
  axis = -1 if interleaved else -2
  signs = np.expand_dims(np.array([[1.0, 1.0], [-1.0, 1.0]], np.float32), -1 - (axis == -1))
  return tuple(
    (jnp.expand_dims(t, axis) * sign).reshape(*t.shape[:-1], -1)
    for t, sign in zip((cos, sin), signs)
  )


def rotate_channels(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False):
  """`rotate` with the cosines and sines of `by_channel`."""
  channels, heads = cos.shape[-1], x.shape[-2]
  if channels > x.shape[-1]:
    raise ValueError(
      f"x has head_dim {x.shape[-1]}, but cos has {channels // 2} angles, for {channels}"
    )
  if channels < x.shape[-1]:
    rotated = rotate_channels(x[..., :channels], cos, sin, interleaved=interleaved)
    return x.at[..., :channels].set(rotated)
  if cos.ndim == x.ndim:
    if heads % cos.shape[-2]:
      raise ValueError(f"{cos.shape[-2]} groups of angles do not divide {heads} heads")
    cos, sin = (jnp.repeat(t, heads // t.shape[-2], axis=-2) for t in (cos, sin))
  else:
    cos, sin = cos[..., None, :], sin[..., None, :]
  return _rotate(interleaved, x.astype(jnp.float32), cos, sin).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(interleaved: bool, x, cos, sin):
  return x * cos + _partners(x, interleaved) * sin


# The derivative is written out so that what is not differentiated, mostly cos and sin, leaves
# nothing in memory for it.
def _rotate_forward(interleaved, x, cos, sin):
  differs = cos.perturbed or sin.perturbed
  kept = cos.value, sin.value, x.value if differs else None
  return _rotate(interleaved, x.value, cos.value, sin.value), kept


def _rotate_backward(interleaved, kept, d_out):
  cos, sin, x = kept
  d_x = d_out * cos + _partners(d_out * sin, interleaved)
  if x is None:
    return d_x, None, None
  d_cos, d_sin = d_out * x, d_out * _partners(x, interleaved)
  return d_x, _sum_to(d_cos, cos.shape), _sum_to(d_sin, sin.shape)


_rotate.defvjp(_rotate_forward, _rotate_backward, symbolic_zeros=True)


def _partners(x, interleaved: bool):
  """Each channel replaced by the other of its pair."""
  pairs = x.shape[-1] // 2
  axis = -1 if interleaved else -2

  def flipped(x):
    shape = (pairs, 2) if interleaved else (2, pairs)
    return jnp.flip(x.reshape(*x.shape[:-1], *shape), axis).reshape(x.shape)

  def joined(x):
    if interleaved:
      x_pairs = x.reshape(*x.shape[:-1], pairs, 2)
      return jnp.concatenate([x_pairs[..., 1:], x_pairs[..., :1]], -1).reshape(x.shape)
    return jnp.concatenate([x[..., pairs:], x[..., :pairs]], -1)

  # Some TPU compilers mishandle halves of heads that are cut and put together (jax issue 37029).
  # XLA for CPU reads them several times as fast as what is reversed, and has fused a reversal into
  # a reduction that was wrong (jax 0.10.2).
  return jax.lax.platform_dependent(x, tpu=flipped, default=joined)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Sums over the axes along which `shape` was broadcast."""
  x = x.sum(tuple(range(x.ndim - len(shape))))
  axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] > 1)
  return x.sum(axes, keepdims=True)
