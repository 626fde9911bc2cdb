"""Rotary position embedding: the `Rope` pytree, its cosines and sines, and the rotation.

Reference: Su et al., RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

TWO_PI = 2 * np.pi


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Rope:
  """Rotary frequencies as data: an argument of the jitted step, never a constant inside it.

  On the host a Rope is float64 numpy and knows where it came from. Crossing `jit`, `vmap` or
  `tree.map` only the numbers survive (`inv_freq`, `turns`, `attention_scale`), so two ropes with
  the same number of frequencies share one compiled program whatever method made them.

  Attributes:
    inv_freq: [..., head_dim / 2] radians per token, one per rotated pair.
    attention_scale: factor on both cos and sin, so that logits are scaled by its square (YaRN).
    theta: base of the geometric frequencies; None inside jit.
    original_context: tokens that the base model was trained on; None inside jit.
    history: the transforms applied, as ((name, options), ...); empty inside jit.
    turns: the same frequencies in turns per token as 64-bit fixed point, two uint32 arrays
      (whole and low part); filled in when a host Rope crosses into JAX.
  """

  inv_freq: np.ndarray | jax.Array
  attention_scale: float | jax.Array = 1.0
  theta: float | None = None
  original_context: int | None = None
  history: tuple = ()
  turns: tuple[jax.Array, jax.Array] | None = None

  @property
  def head_dim(self) -> int:
    """Number of rotated channels of a head."""
    return 2 * self.inv_freq.shape[-1]

  @property
  def wavelengths(self) -> np.ndarray:
    """[..., head_dim / 2] tokens per full turn; infinite where the frequency is zero."""
    with np.errstate(divide="ignore"):
      return TWO_PI / np.asarray(self.inv_freq, np.float64)

  def apply(self, name: str, inv_freq, attention_scale: float = 1.0, **options) -> Rope:
    """A new Rope with these frequencies; `attention_scale` multiplies the present one.

    Raises:
      ValueError: if a frequency is negative or not finite, or this Rope has been through jit.
    """
    if self.theta is None:
      raise ValueError(f"{name}: transforms run on the host, before jit; this rope came out of jit")
    inv_freq = np.asarray(inv_freq, np.float64)
    if not np.all(np.isfinite(inv_freq)) or np.any(inv_freq < 0):
      raise ValueError(f"{name}: frequencies must be finite and not negative, got {inv_freq}")
    return dataclasses.replace(
      self,
      inv_freq=inv_freq,
      attention_scale=float(self.attention_scale) * float(attention_scale),
      history=(*self.history, (name, options)),
      turns=None,
    )

  def with_inv_freq(self, inv_freq: jax.Array) -> Rope:
    """The same rope with traced float32 frequencies, e.g. to differentiate or search them."""
    return dataclasses.replace(self, inv_freq=inv_freq, turns=None)

  def tree_flatten(self):
    if isinstance(self.inv_freq, np.ndarray) and self.inv_freq.dtype == np.float64:
      children = (
        self.inv_freq.astype(np.float32),
        np.asarray(self.attention_scale, np.float32),
        _fixed_point(self.inv_freq),
      )
    else:
      children = (self.inv_freq, self.attention_scale, self.turns)
    return children, None

  @classmethod
  def tree_unflatten(cls, _, children):
    inv_freq, attention_scale, turns = children
    return cls(inv_freq=inv_freq, attention_scale=attention_scale, turns=turns)


def base(*, head_dim: int, theta: float, original_context: int) -> Rope:
  """Plain RoPE: inv_freq_i = theta^(-2i / head_dim), i = 0 .. head_dim/2 - 1.

  Args:
    head_dim: rotated channels of a head; even and positive.
    theta: base of the geometric series, above 1.
    original_context: tokens that the model was trained on.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  if head_dim <= 0 or head_dim % 2:
    raise ValueError(f"head_dim must be even and positive, got {head_dim}")
  if not (np.isfinite(theta) and theta > 1):
    raise ValueError(f"theta must be finite and above 1, got {theta}")
  if original_context < 1:
    raise ValueError(f"original_context must be at least 1 token, got {original_context}")
  inv_freq = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  return Rope(inv_freq, 1.0, float(theta), int(original_context))


def cos_sin(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotation angles, times the attention scale.

  The angle is reduced to one turn in 64-bit fixed point, where it is exact: multiplying two
  integers modulo 2^64 *is* reduction modulo a turn. The product position * inv_freq in float32
  would be off by 0.06 rad at two million tokens; this is within 1e-6 rad of the float64 angle at
  any int32 position. Frequencies traced in float32 (`with_inv_freq`) have but their own 24 bits,
  a relative 1e-7: rotations stay exact relative to each other, of a frequency that much off.

  Args:
    rope: frequencies, of shape [head_dim / 2].
    positions: [...] int32 token positions, not negative.

  Returns:
    cos, sin: [..., head_dim / 2] float32. Differentiable with respect to `rope.inv_freq`.

  Raises:
    ValueError: if positions are not integers (a float or bf16 position is already wrong).
  """
  positions = jnp.asarray(positions)
  if not jnp.issubdtype(positions.dtype, jnp.integer):
    raise ValueError(f"positions must be integers, got {positions.dtype}")
  (inv_freq, scale, turns), _ = rope.tree_flatten()
  inv_freq = jnp.asarray(inv_freq, jnp.float32)
  high, low = _fixed_point_traced(inv_freq) if turns is None else turns
  high, low = jnp.asarray(high, jnp.uint32), jnp.asarray(low, jnp.uint32)
  p = positions.astype(jnp.uint32)[..., None]
  fraction = p * high + _multiply_high(p, low)  # in units of 2^-32 turn
  angle = fraction.astype(jnp.int32).astype(jnp.float32) * np.float32(TWO_PI / 2**32)
  # Zero in value; carries d angle / d inv_freq = position, which integers cannot.
  angle += positions.astype(jnp.float32)[..., None] * (inv_freq - jax.lax.stop_gradient(inv_freq))
  return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
  """Rotates each pair of channels by its angle, in float32.

  The partner of each channel comes from reversing an axis of length two: no slice and
  concatenate of half heads, which some TPU compilers mishandle (jax issue 37029).

  Args:
    x: [..., tokens, heads, head_dim] queries or keys.
    cos, sin: [..., tokens, head_dim / 2] from `cos_sin`.
    interleaved: pairs are channels (2i, 2i+1) as in RoFormer and GGUF files, instead of
      (i, i + head_dim/2), the half-split layout of Hugging Face checkpoints.

  Returns:
    The rotated array, with the shape and dtype of x.

  Raises:
    ValueError: if head_dim is not twice the number of angles.
  """
  pairs = cos.shape[-1]
  if x.shape[-1] != 2 * pairs:
    raise ValueError(f"x has head_dim {x.shape[-1]}, but cos has {pairs} angles, for {2 * pairs}")
  axis = -1 if interleaved else -2
  x_pairs = x.reshape(*x.shape[:-1], *((pairs, 2) if interleaved else (2, pairs)))
  x_pairs = x_pairs.astype(jnp.float32)
  cos, sin = (jnp.expand_dims(t[..., None, :], axis) for t in (cos, sin))
  sign = np.array([-1.0, 1.0], np.float32).reshape((2,) if interleaved else (2, 1))
  rotated = x_pairs * cos + jnp.flip(x_pairs, axis) * (sign * sin)
  return rotated.reshape(x.shape).astype(x.dtype)


def _fixed_point(inv_freq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Float64 radians per token -> turns per token modulo 1, as two 32-bit halves of 2^64."""
  turns = np.asarray(inv_freq, np.float64) / TWO_PI % 1.0 * 2.0**32
  high = np.floor(turns)
  return high.astype(np.uint32), np.floor((turns - high) * 2.0**32).astype(np.uint32)


def _fixed_point_traced(inv_freq: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The same for traced float32 frequencies: their own 24 bits, hence exact up to one ulp."""
  turns = jax.lax.stop_gradient(inv_freq) * np.float32(1 / TWO_PI)
  scaled = (turns - jnp.floor(turns)) * np.float32(2.0**32)
  high = jnp.floor(scaled)
  low = (scaled - high) * np.float32(2.0**32)  # not zero for slow pairs, where it matters most
  return high.astype(jnp.uint32), low.astype(jnp.uint32)


def _multiply_high(a: jax.Array, b: jax.Array) -> jax.Array:
  """Upper 32 bits of the 64-bit product of two uint32 (short of the carry, at most 2 units)."""
  a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
  return a_high * b_high + ((a_high * b_low) >> 16) + ((a_low * b_high) >> 16)
