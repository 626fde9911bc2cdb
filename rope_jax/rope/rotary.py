"""Rotary position embedding: the `Rope` pytree, its cosines and its sines.

Reference: Su et al., RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.rope.limits import check_positions, check_tokens

# Of a head: transforms make float64 arrays of them on the host.
MOST_CHANNELS = 2**16

TWO_PI = 2 * np.pi
# Radians per token. Beyond, not even float64 tells angles at two million tokens to 1e-6.
MOST_RADIANS = 2.0**11


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Rope:
  """Rotary frequencies as data: an argument of the jitted step, never a constant inside it.

  On the host a Rope is float64 numpy and knows where it came from. Crossing `jit`, `vmap` or
  `tree.map` only the numbers survive, so two ropes with the same number of frequencies share one
  compiled program whatever method made them.

  Numbers:
    inv_freq: [..., pairs] radians per token, one per rotated pair of channels. Leading axes, all
      optional: [pairs], [layers, pairs] or [layers, heads, pairs] (heads that share keys, so KV
      heads; either may be 1). See `stack`.
    attention_scale: factor on both cos and sin, so that logits are scaled by its square (YaRN);
      a number, or one for each leading index of inv_freq.
    turns: the same frequencies as 64-bit fixed point, and the periods of `resonance`: three
      uint32 arrays (whole turns, low part, period or 0); filled in when a host Rope enters JAX.
    short, start_tokens: another rope for some tokens: those at positions before start_tokens
      (LongRoPE's n-hat), and those that the caller of `cos_sin` marks (LongRoPE2's windows).
    mix: (cos [..., pairs, pairs], sin [..., pairs, pairs], offset [pairs]): cos and sin are
      mixed over the pairs and the offset is added to sin (FoPE).
    time: length ratio t of a learned frequency dynamics (CLEX).

  Host only, None or empty inside jit:
    theta: base of the geometric frequencies.
    original_context: tokens that the base model was trained on.
    context: tokens that the frequencies are stretched for.
    head_dim: channels of a head, of which the first 2 * pairs are rotated.
    period: tokens after which a pair repeats exactly, 0 where it need not; see `resonance`.
    history: the transforms applied, as ((name, options), ...).
  """

  inv_freq: np.ndarray | jax.Array
  attention_scale: float | np.ndarray | jax.Array = 1.0
  theta: float | None = None
  original_context: int | None = None
  context: int | None = None
  head_dim: int | None = None
  history: tuple = ()
  period: np.ndarray | None = None
  turns: tuple[jax.Array, jax.Array, jax.Array] | None = None
  short: Rope | None = None
  start_tokens: int | jax.Array | None = None
  mix: tuple | None = None
  time: float | jax.Array | None = None

  @property
  def rotary_dim(self) -> int:
    """Number of rotated channels of a head."""
    return 2 * self.inv_freq.shape[-1]

  @property
  def wavelengths(self) -> np.ndarray:
    """[..., pairs] tokens per full turn; infinite where the frequency is zero."""
    with np.errstate(divide="ignore", over="ignore"):
      return TWO_PI / np.asarray(self.inv_freq, np.float64)

  @property
  def extended_by(self) -> str | None:
    """The transform that stretched this rope past its original context, if one has."""
    found = None
    for name, options in self.history:
      if options.get("factor", 1) > 1 or "seq_len" in options or options.get("extended"):
        found = name
      elif name == "rebase":
        found = None
    return found

  def apply(self, name: str, inv_freq, attention_scale=1.0, **options) -> Rope:
    """A new Rope with these frequencies; `attention_scale` multiplies the present one.

    Args:
      name: of the transform, for `history` and errors.
      inv_freq: [..., pairs] radians per token.
      attention_scale: as in `Rope`.
      **options: for `history`. `factor` above 1, or `seq_len`, says that this stretches the rope.

    Raises:
      ValueError: if a frequency is negative or not finite or above 2^11 radians a token, their
        number differs, the attention scale is no positive float32, the rope is stretched already
        or past 2^31 - 1 tokens, or it has been through jit.
    """
    self.require_host(name)
    inv_freq = np.asarray(inv_freq, np.float64)
    wrong = ~np.isfinite(inv_freq) | (inv_freq < 0)
    if np.any(wrong):
      raise ValueError(
        f"{name}: frequencies must be finite and not negative, got {inv_freq[wrong][0]}"
      )
    if np.any(inv_freq > MOST_RADIANS):
      raise ValueError(
        f"{name}: frequencies must be at most {MOST_RADIANS:g} radians a token, for angles to be "
        f"exact at long positions, got {inv_freq.max():g}"
      )
    attention_scale = self.attention_scale * attention_scale
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if not (np.all(attention_scale >= least) and np.all(attention_scale <= most)):
      raise ValueError(
        f"{name}: the attention scale must be a positive float32, got {attention_scale}"
      )
    if inv_freq.shape[-1:] != self.inv_freq.shape[-1:]:
      raise ValueError(
        f"{name}: {self.inv_freq.shape[-1]} frequencies expected, got {inv_freq.shape}"
      )
    context, factor = self.context, options.get("factor", 1.0)
    if factor > 1 or "seq_len" in options:
      self.refuse_twice(name)
      context = max(options.get("seq_len", 0), round(self.original_context * factor))
      check_tokens(f"{name}: original_context times factor, or seq_len,", context)
    return dataclasses.replace(
      self,
      inv_freq=inv_freq,
      attention_scale=attention_scale,
      context=context,
      history=(*self.history, (name, options)),
      period=None,
      turns=None,
    )

  def require_host(self, name: str) -> None:
    """Raises ValueError if this rope has been through jit."""
    if self.theta is None:
      raise ValueError(f"{name}: transforms run on the host, before jit; this rope came out of jit")

  def refuse_twice(self, name: str) -> None:
    """Raises ValueError if this rope is stretched already, before `name` does it again."""
    if self.extended_by:
      raise ValueError(
        f"{name}: this rope is already stretched by {self.extended_by}, to {self.context} tokens, "
        "and would be scaled twice. If those frequencies are the model's own, say so with "
        "rope.rebase(rope)"
      )

  def with_inv_freq(self, inv_freq: jax.Array) -> Rope:
    """The same rope with traced float32 frequencies, e.g. to differentiate or search them."""
    return dataclasses.replace(self, inv_freq=inv_freq, period=None, turns=None)

  def tree_flatten(self):
    rest = (self.short, self.start_tokens, self.mix, self.time)
    if isinstance(self.inv_freq, np.ndarray) and self.inv_freq.dtype == np.float64:
      period = np.zeros_like(self.inv_freq) if self.period is None else self.period
      numbers = (
        self.inv_freq.astype(np.float32),
        np.asarray(self.attention_scale, np.float32),
        (*_fixed_point(self.inv_freq), period.astype(np.uint32)),
      )
    else:
      numbers = (self.inv_freq, self.attention_scale, self.turns)
    return (*numbers, *rest), None

  @classmethod
  def tree_unflatten(cls, _, children):
    names = ("inv_freq", "attention_scale", "turns", "short", "start_tokens", "mix", "time")
    return cls(**dict(zip(names, children)))


def base(
  *, head_dim: int, theta: float, original_context: int, partial_rotary_factor: float = 1.0
) -> Rope:
  """Plain RoPE: inv_freq_i = theta^(-2i / d), i = 0 .. d/2 - 1, d = rotated channels.

  Args:
    head_dim: channels of a head; even and positive.
    theta: base of the geometric series, above 1.
    original_context: tokens that the model was trained on.
    partial_rotary_factor: share of the channels that is rotated, d = head_dim * factor; the rest
      pass through. Hugging Face's 'proportional' is another thing: see `proportional`.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  if not 0 < head_dim <= MOST_CHANNELS or head_dim % 2:
    expected = f"even and positive, and at most {MOST_CHANNELS:,}"
    raise ValueError(f"head_dim must be {expected}, got {head_dim}")
  if not (np.isfinite(theta) and theta > 1):
    raise ValueError(f"theta must be finite and above 1, got {theta}")
  check_tokens("original_context", original_context)
  share = 0 < partial_rotary_factor <= 1
  d = int(head_dim * partial_rotary_factor) if share else 0
  if not share or d < 2 or d % 2:
    raise ValueError(
      f"partial_rotary_factor={partial_rotary_factor} must be in (0, 1] and leave an even number "
      f"of the {head_dim} channels, not {d}"
    )
  inv_freq = float(theta) ** (-np.arange(0, d, 2, dtype=np.float64) / d)
  length = int(original_context)
  return Rope(inv_freq, 1.0, float(theta), length, context=length, head_dim=int(head_dim))


def rebase(rope: Rope, original_context: int | None = None) -> Rope:
  """Declares the frequencies of a rope the model's own, so that it can be stretched further.

  A checkpoint that was itself extended (Llama 3.1, or one trained by this library) has a scaled
  rope; what comes next starts from that one and from the context that it was trained for.

  Args:
    rope: as the model has it.
    original_context: tokens that the model was trained on; `rope.context` if None.

  Raises:
    ValueError: if original_context is not from 1 to 2^31 - 1, or the rope has been through jit.
  """
  rope.require_host("rebase")
  length = rope.context if original_context is None else original_context
  check_tokens("rebase: original_context", length)
  length = int(length)
  history = (*rope.history, ("rebase", dict(original_context=length)))
  return dataclasses.replace(rope, original_context=length, context=length, history=history)


def stack(ropes: list[Rope], axis: str = "layer") -> Rope:
  """One rope from several, one for each layer or for each KV head.

  Args:
    ropes: made from the same base; for axis 'head', all layers share them.
    axis: 'layer' or 'head'.

  Returns:
    A Rope with inv_freq [layers, pairs], or [1, heads, pairs].

  Raises:
    ValueError: for another axis, or ropes that are stacked already or not alike.
  """
  if axis not in ("layer", "head"):
    raise ValueError(f"axis must be 'layer' or 'head', got {axis!r}")
  if not ropes:
    raise ValueError("stack: no ropes given")
  first = ropes[0]
  for r in ropes:
    r.require_host("stack")
    for key in ("theta", "original_context", "head_dim"):
      if getattr(r, key) != getattr(first, key):
        raise ValueError(
          f"stack: {key} is {getattr(r, key)} and {getattr(first, key)}: the ropes are not alike"
        )
    if r.inv_freq.shape != first.inv_freq.shape or r.inv_freq.ndim != 1:
      raise ValueError(f"stack: shapes {r.inv_freq.shape} and {first.inv_freq.shape}: not alike")
    if any(x is not None for x in (r.short, r.start_tokens, r.mix, r.time)):
      raise ValueError("stack: only ropes of frequencies and attention scales can be stacked")
  lead = (len(ropes),) if axis == "layer" else (1, len(ropes))
  periods = [np.zeros_like(r.inv_freq) if r.period is None else r.period for r in ropes]
  return dataclasses.replace(
    first,
    inv_freq=np.stack([r.inv_freq for r in ropes]).reshape(*lead, -1),
    attention_scale=np.array([r.attention_scale for r in ropes], np.float64).reshape(lead),
    period=np.stack(periods).reshape(*lead, -1),
    context=max(r.context for r in ropes),
    history=(("stack", dict(axis=axis, extended=any(r.extended_by for r in ropes))),),
  )


def per_layer(rope: Rope, layers: int) -> Rope:
  """The same rope with a leading axis of `layers` on every number, to scan over; inside jit, too.

  Raises:
    ValueError: if it has frequencies for another number of layers.
  """
  own = rope.inv_freq.shape[0] if rope.inv_freq.ndim > 1 else 1
  if own not in (1, layers):
    raise ValueError(f"the rope has frequencies for {own} layers, the model has {layers}")
  numbers, _ = rope.tree_flatten()
  inv_freq, scale, turns, short, start_tokens, mix, time = numbers

  def spread(x, lead=0):  # `lead`: whether x has an axis of layers
    x = jnp.asarray(x)
    return jnp.broadcast_to(x if lead else x[None], (layers, *x.shape[lead:]))

  lead = int(inv_freq.ndim > 1)
  return Rope(
    inv_freq=spread(inv_freq, lead),
    attention_scale=spread(scale, min(lead, jnp.ndim(scale))),
    turns=turns and tuple(spread(x, lead) for x in turns),
    short=short and per_layer(short, layers),
    start_tokens=None if start_tokens is None else spread(start_tokens),
    mix=mix and tuple(spread(x) for x in mix),
    time=None if time is None else spread(time),
  )


def cos_sin(
  rope: Rope,
  positions: jax.Array,
  *,
  fractions: jax.Array | None = None,
  short: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotation angles, times the attention scale.

  The angle is reduced to one turn in 64-bit fixed point, where it is exact: multiplying two
  integers modulo 2^64 *is* reduction modulo a turn. The product position * inv_freq in float32
  would be off by 0.06 rad at two million tokens; this is within 1e-6 rad of the float64 angle at
  any int32 position (of pairs faster than a radian a token, to two million). Frequencies traced in
  float32 (`with_inv_freq`) have but their own 24 bits, a relative 1e-7, which is 0.2 rad of the
  fastest pair there: rotations stay exact relative to each other, of a frequency that much off.
  Pairs with a period (`resonance`) repeat bit for bit: positions are reduced modulo it first.

  Args:
    rope: frequencies [pairs], [1, heads, pairs], or with an axis of layers, which goes the same way
      as heads (a model takes one layer at a time, see `per_layer`).
    positions: [...] token positions, integers from 0 to 2^31 - 1. Inside jit or vmap their values
      are not known: those that are out of range there wrap without an error.
    fractions: [...] float32 in [0, 1), added to positions (E2-LLM, CLEX); none if None.
    short: [...] bool, tokens that get `rope.short` instead.

  Returns:
    cos, sin: float32 [..., pairs], or [..., heads, pairs] with frequencies by head. Differentiable
    with respect to `rope.inv_freq`.

  Raises:
    ValueError: if positions are not integers (a float or bf16 position is already wrong) or out of
      range, the frequencies narrower than float32, or `short` is given for a rope that has none.
  """
  positions = check_positions(positions)
  if rope.inv_freq.ndim == 3 and rope.inv_freq.shape[0] == 1:
    rope = jax.tree.map(lambda x: x[0], per_layer(rope, 1))
  cos, sin = _cos_sin(rope, positions, fractions)
  if short is not None and rope.short is None:
    raise ValueError("tokens are marked short, but this rope has no rope.short")
  chosen = jnp.zeros(positions.shape, bool) if short is None else short
  if rope.start_tokens is not None:
    chosen |= positions < rope.start_tokens
  if rope.short is not None and (short is not None or rope.start_tokens is not None):
    wide = positions.shape + (1,) * (cos.ndim - positions.ndim)  # over layers and heads
    others = [x.reshape(*wide[:-1], -1) for x in _cos_sin(rope.short, positions, fractions)]
    cos, sin = (jnp.where(chosen.reshape(wide), a, b) for a, b in zip(others, (cos, sin)))
  return cos, sin


def _cos_sin(rope: Rope, positions, fractions) -> tuple[jax.Array, jax.Array]:
  (inv_freq, scale, turns, *_), _ = rope.tree_flatten()
  if jnp.finfo(inv_freq.dtype).bits < 32:
    raise ValueError(f"frequencies must be float32 or wider, got {inv_freq.dtype}")
  inv_freq = jnp.asarray(inv_freq, jnp.float32)
  p = positions.astype(jnp.uint32).reshape(positions.shape + (1,) * inv_freq.ndim)
  if turns is None:
    high, low = _fixed_point_traced(inv_freq)
  else:
    high, low, period = (jnp.asarray(x, jnp.uint32) for x in turns)
    p = jnp.where(period > 0, p % jnp.maximum(period, 1), p)
  fraction = p * high + _multiply_high(p, low)  # in units of 2^-32 turn
  angle = fraction.astype(jnp.int32).astype(jnp.float32) * np.float32(TWO_PI / 2**32)
  if fractions is not None:
    angle += fractions.reshape(p.shape[: positions.ndim] + (1,) * inv_freq.ndim) * inv_freq
  # Zero in value; carries d angle / d inv_freq = position, which integers cannot.
  position = positions.astype(jnp.float32).reshape(positions.shape + (1,) * inv_freq.ndim)
  angle += position * (inv_freq - jax.lax.stop_gradient(inv_freq))
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if rope.mix is not None:
    mix_cos, mix_sin, offset = (jnp.asarray(x, jnp.float32) for x in rope.mix)
    # Accelerators multiply float32 in bfloat16 unless they are told not to.
    cos, sin = (
      jnp.einsum(
        "...p,...pq->...q",
        x[..., None, :] if mix.ndim > 2 else x,
        mix,
        precision=jax.lax.Precision.HIGHEST,
      )
      for x, mix in ((cos, mix_cos), (sin, mix_sin))
    )
    sin += offset
  scale = jnp.asarray(scale, jnp.float32)[..., None]
  return cos * scale, sin * scale


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
