"""Phase shift calibration (PSC) as functions: a learned gain on un-rotated queries and keys.

Source: "Phase Shift Calibration" (EMNLP 2024, arXiv 2505.12423), as released in WNQzhu/PSC.
The released module computes no angle: it is a bounded, content-dependent,
element-wise gain, and can shift the phase of a pair by less than 30 degrees. `psc_rotation` is a
variant of ours, not of the release, that does what the name says.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rope_jax.rope.rotation import rotate


@jax.named_scope("psc")
def psc_gate(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
  """g = 1 + tanh(SiLU(x U_h) D_h) / 2 for each head h, element-wise in (0.5, 1.5).

  Args:
    x: [..., heads, head_dim] queries or keys.
    up: [heads, head_dim, head_dim], applied first, zero at the start; [1, ...] for all heads.
    down: [heads, head_dim, head_dim], applied second.

  Returns:
    The gate, with the shape and dtype of x; computed in float32 after the products.
  """
  y = _two_layers(x, up, down)
  return (1 + 0.5 * jnp.tanh(y.astype(jnp.float32))).astype(x.dtype)


@jax.named_scope("psc")
def psc(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
  """The calibrated x * gate(x). With `up` zero this is x, bit for bit. Shapes as `psc_gate`."""
  return x * psc_gate(x, up, down)


@jax.named_scope("psc")
def psc_rotation(
  x: jax.Array, up: jax.Array, down: jax.Array, *, bound: float | None = math.pi
) -> jax.Array:
  """Rotates each pair by a learned, content-dependent angle SiLU(x U_h) D_h.

  Two-dimensional rotations commute, so it makes no difference whether RoPE comes before or after;
  lengths are kept. With `up` zero this is x, bit for bit.

  Args:
    x: [..., heads, head_dim] queries or keys in the half-split layout.
    up: [heads, head_dim, head_dim], applied first, zero at the start.
    down: [heads, head_dim, pairs], applied second.
    bound: angles are bound * tanh(.) in radians; unbounded if None.
  """
  angle = _two_layers(x, up, down).astype(jnp.float32)
  angle = angle if bound is None else bound * jnp.tanh(angle)
  return rotate(x, jnp.cos(angle), jnp.sin(angle))


def psc_init(
  key: jax.Array, heads: int, head_dim: int, scale: str = "released", outputs: int | None = None
) -> dict:
  """Initial float32 parameters {'up': zeros [heads, d, d], 'down': U(-bound, bound)}.

  Args:
    key: PRNG key.
    heads: query heads, or KV heads for keys; 1 if they share.
    head_dim: d.
    outputs: last dimension of `down` [heads, d, outputs]: d (the default) for `psc`, the number
      of pairs for `psc_rotation`.
    scale: 'released' has bound 1/d, which is what PyTorch's kaiming_uniform_(a=sqrt 5) gives for
      the released 3-D tensor; 'fan_in' has 1/sqrt(d), what a d x d layer would get.

  Raises:
    ValueError: for another scale.
  """
  bounds = dict(released=1 / head_dim, fan_in=1 / math.sqrt(head_dim))
  if scale not in bounds:
    raise ValueError(f"psc.init must be one of {sorted(bounds)}, got {scale!r}")
  shape = (heads, head_dim, outputs or head_dim)
  down = jax.random.uniform(key, shape, minval=-bounds[scale], maxval=bounds[scale])
  return dict(up=jnp.zeros((heads, head_dim, head_dim)), down=down)


def psc_parameter_count(
  layers: int, heads: int, kv_heads: int, head_dim: int, share: str = "none"
) -> int:
  """2 d^2 (query heads + KV heads) for each layer; 67,108,864 for Llama-2 7B.

  `share` is that of `config.rope.psc`: 'none', 'heads', 'layers' or 'all'.
  """
  layers = 1 if share in ("layers", "all") else layers
  heads = 2 if share in ("heads", "all") else heads + kv_heads
  return layers * 2 * head_dim**2 * heads


def _two_layers(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
  """SiLU(x U_h) D_h for each head, in the dtype of x."""
  up, down = (jnp.broadcast_to(w, (x.shape[-2], *w.shape[1:])).astype(x.dtype) for w in (up, down))
  # Heads first, as a batched product gives them: one transposition instead of one a product.
  x = jnp.moveaxis(x, -2, 0)
  hidden = jnp.einsum("h...d,hdr->h...r", x, up)
  y = jnp.einsum("h...r,hro->h...o", jax.nn.silu(hidden), down)
  return jnp.moveaxis(y, 0, -2)
