"""Interpolation: frequency transforms by an extension factor, computed in float64 on the host.

Each takes a `Rope` and the extension factor s = target / original context, and returns a new
`Rope`; they compose with those of `shaping` and with `resonance`, not with each other (that would
scale twice). Options are keyword-only: `config.rope.<method>` is made from the signature.

Notation: d = rotated channels, i = pair index, b = theta, L = original context in tokens.
Every method raises ValueError for a factor below 1 or an option out of range, naming it.
"""

from __future__ import annotations

import math

import numpy as np

from rope_jax.rope.limits import check_tokens
from rope_jax.rope.rotary import TWO_PI, Rope


def none(rope: Rope) -> Rope:
  """The model's own frequencies, untouched."""
  return rope


def pi(rope: Rope, factor: float) -> Rope:
  """Position interpolation: all frequencies / s (Chen et al., arXiv 2306.15595). HF 'linear'."""
  check_factor("pi", factor)
  return rope.apply("pi", rope.inv_freq / factor, factor=factor)


def ntk(rope: Rope, factor: float) -> Rope:
  """NTK-aware: b -> b s^(d/(d-2)), so the slowest pair is interpolated by s, the fastest by 1.

  Source: bloc97, 2023, as in jquesnelle/yarn. HF has no name for it: it is a larger rope_theta.
  """
  check_factor("ntk", factor)
  return rope.apply("ntk", rope.inv_freq * _ntk_multiplier(rope, factor), factor=factor)


def ntk_critical(rope: Rope, factor: float) -> Rope:
  """NTK by the critical dimension: b -> b^(ln(T / 2 pi) / ln(L / 2 pi)), T = s L.

  The pair whose wavelength was L then has wavelength T: it is interpolated by exactly s, slower
  pairs by more. Source: Liu et al., Scaling Laws of RoPE-based Extrapolation (arXiv 2310.05209);
  the 'NTK' of the LongRoPE2 paper.
  """
  check_factor("ntk_critical", factor)
  L = rope.original_context
  if L <= TWO_PI:
    raise ValueError(f"ntk_critical: original_context must be above 2 pi tokens, got {L}")
  power = math.log(factor * L / TWO_PI) / math.log(L / TWO_PI)
  multiplier = rope.theta ** ((power - 1) * -_places(rope))
  return rope.apply("ntk_critical", rope.inv_freq * multiplier, factor=factor)


def ntk_mixed(rope: Rope, factor: float, *, b: float = 0.625) -> Rope:
  """Mixed-base NTK: each frequency divided by exp(a (i + 1)^b), a = ln(s) / (d/2)^b.

  The slowest pair is divided by s, and b says how the rest share it (b = 1: evenly in the
  logarithm). Source: kexue.fm 9706, vLLM's NTKScalingRotaryEmbedding with `mixed_b`. The default
  is ours.
  """
  check_factor("ntk_mixed", factor)
  if not 0 < b < math.inf:
    raise ValueError(f"ntk_mixed.b must be positive, got {b}")
  half = rope.rotary_dim // 2
  inv_freq = rope.inv_freq * factor ** -((np.arange(1, half + 1) / half) ** b)
  return rope.apply("ntk_mixed", inv_freq, factor=factor, b=b)


def ntk_by_parts(
  rope: Rope,
  factor: float,
  *,
  ramp: str = "dim",
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
  truncate: bool = True,
) -> Rope:
  """NTK-by-parts: fast pairs untouched, slow pairs interpolated by s, a ramp between.

  Args:
    rope: base frequencies.
    factor: s.
    ramp: 'dim' is linear in the pair index, as in YaRN's released code and every checkpoint;
      'rotation' is linear in the rotations L / wavelength, as in the paper (its eq. for gamma).
      They differ by up to 0.37 in the blend for Llama-2.
    beta_fast: pairs with more rotations inside L than this are untouched.
    beta_slow: pairs with fewer rotations than this are interpolated.
    truncate: round the ends of the 'dim' ramp outwards to whole pairs, as the code does.

  Source: Peng et al., YaRN (arXiv 2309.00071) section 3.2; jquesnelle/yarn. The three-way blend
  that the repository itself calls PartNTK is an older method: `ntk_by_parts_v1`.
  """
  check_factor("ntk_by_parts", factor)
  inv_freq = _by_parts(rope, factor, "ntk_by_parts", ramp, beta_fast, beta_slow, truncate)
  options = dict(ramp=ramp, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate)
  return rope.apply("ntk_by_parts", inv_freq, factor=factor, **options)


def ntk_by_parts_v1(
  rope: Rope,
  factor: float,
  *,
  beta: tuple[float, float] = (1.25, 0.75),
  gamma: tuple[float, float] = (16.0, 2.0),
) -> Rope:
  """The older three-way blend: interpolated to NTK over `beta`, then to untouched over `gamma`.

  Args:
    rope: base frequencies.
    factor: s.
    beta: rotations inside L from which a pair is NTK-aware, and below which it is interpolated.
    gamma: rotations from which a pair is untouched, and below which it is as by `beta`.

  Source: jquesnelle/yarn, `LlamaPartNTKScaledRotaryEmbedding` (master); before the paper.
  """
  check_factor("ntk_by_parts_v1", factor)
  for name, value in (("beta", beta), ("gamma", gamma)):
    if len(value) != 2:
      raise ValueError(f"ntk_by_parts_v1.{name} must be two numbers of rotations, got {value}")
  ntk_freq = rope.inv_freq * _ntk_multiplier(rope, factor)
  slow = _ramp(rope, "ntk_by_parts_v1.beta", *beta)
  blend = ntk_freq * slow + rope.inv_freq / factor * (1 - slow)
  keep = _ramp(rope, "ntk_by_parts_v1.gamma", *gamma)
  inv_freq = rope.inv_freq * keep + blend * (1 - keep)
  return rope.apply(
    "ntk_by_parts_v1", inv_freq, factor=factor, beta=tuple(beta), gamma=tuple(gamma)
  )


def yarn(
  rope: Rope,
  factor: float,
  *,
  ramp: str = "dim",
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
  truncate: bool = True,
  mscale: float | None = None,
  mscale_all_dim: float | None = None,
  attention_factor: float | None = None,
) -> Rope:
  """YaRN: NTK-by-parts frequencies and a temperature, 0.1 ln(s) + 1 on both cos and sin.

  Args:
    rope: base frequencies.
    factor: s.
    ramp, beta_fast, beta_slow, truncate: as in `ntk_by_parts`.
    mscale, mscale_all_dim: if both are given and not zero, the attention scale is
      m(mscale) / m(mscale_all_dim) with m(k) = 0.1 k ln(s) + 1 (DeepSeek). One alone does
      nothing in Hugging Face; here it is an error.
    attention_factor: the attention scale itself; overrides the rest.

  Source: Peng et al. (arXiv 2309.00071); keys and defaults of Hugging Face's 'yarn'.
  """
  check_factor("yarn", factor)
  inv_freq = _by_parts(rope, factor, "yarn", ramp, beta_fast, beta_slow, truncate)
  for key, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
    if value is not None and not 0 <= value < math.inf:
      raise ValueError(f"yarn.{key} must be 0 (off) or positive, got {value}")
  if bool(mscale) != bool(mscale_all_dim):
    raise ValueError(
      f"yarn.mscale={mscale} and yarn.mscale_all_dim={mscale_all_dim} only work together"
    )
  if attention_factor is not None:
    if mscale:
      raise ValueError("yarn.attention_factor overrides yarn.mscale: give one or the other")
    if not attention_factor > 0:
      raise ValueError(f"yarn.attention_factor must be positive, got {attention_factor}")
    scale = attention_factor
  else:
    scale = temperature(factor, mscale or 1.0) / (
      temperature(factor, mscale_all_dim) if mscale else 1.0
    )
  if not fits_float32(scale):
    raise ValueError(
      f"yarn.mscale={mscale} and yarn.mscale_all_dim={mscale_all_dim} make an attention scale of "
      f"{scale:g}, which float32 does not hold"
    )
  options = dict(ramp=ramp, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate)
  options |= dict(mscale=mscale, mscale_all_dim=mscale_all_dim, attention_factor=attention_factor)
  return rope.apply("yarn", inv_freq, scale, factor=factor, **options)


def dynamic_ntk(rope: Rope, factor: float, *, seq_len: int) -> Rope:
  """Dynamic NTK for a sequence of `seq_len` tokens: the identity up to L, then

      b -> b (s n / L - (s - 1))^(d/(d-2)),  n = seq_len.

  The length is an argument, resolved by the caller at each call: there is no state that could go
  stale against a KV cache. With s = 1 this is NTK-aware with factor n / L.
  Source: Hugging Face 'dynamic' (where L is max_position_embeddings), jquesnelle/yarn.
  """
  check_factor("dynamic_ntk", factor)
  check_length("dynamic_ntk", seq_len)
  ratio = max(seq_len, rope.original_context) / rope.original_context
  alpha = factor * ratio - (factor - 1)
  options = dict(factor=factor, seq_len=seq_len)
  return rope.apply("dynamic_ntk", rope.inv_freq * _ntk_multiplier(rope, alpha), **options)


def dynamic_yarn(
  rope: Rope,
  *,
  seq_len: int,
  ramp: str = "dim",
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
  truncate: bool = True,
) -> Rope:
  """YaRN with s = max(1, n / L) for a sequence of n = `seq_len` tokens; options as in `yarn`.

  Short inputs are untouched. Deviation: the released class never shrinks back after a long
  input, and its model file divides by max_position_embeddings instead of L; here s is a function
  of the length alone. Source: jquesnelle/yarn, `LlamaDynamicYaRNScaledRotaryEmbedding`.
  """
  check_length("dynamic_yarn", seq_len)
  s = max(seq_len / rope.original_context, 1.0)
  inv_freq = _by_parts(rope, s, "dynamic_yarn", ramp, beta_fast, beta_slow, truncate)
  options = dict(ramp=ramp, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate)
  return rope.apply("dynamic_yarn", inv_freq, temperature(s), seq_len=seq_len, **options)


def llama3(
  rope: Rope, factor: float, *, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0
) -> Rope:
  """Llama 3.1: by parts in the rotations r = L / wavelength, from `low` to `high` rotations.

  Pairs with r > high_freq_factor are untouched, with r < low_freq_factor divided by s, and
  between them the blend is linear in r. Source: meta-llama, Hugging Face 'llama3'.
  """
  check_factor("llama3", factor)
  rope.require_host("llama3")
  if not 0 < low_freq_factor < high_freq_factor < math.inf:
    raise ValueError(
      "llama3 needs 0 < low_freq_factor < high_freq_factor, got "
      f"low_freq_factor={low_freq_factor}, high_freq_factor={high_freq_factor}"
    )
  rotations = rope.original_context * rope.inv_freq / TWO_PI
  keep = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)
  options = dict(low_freq_factor=low_freq_factor, high_freq_factor=high_freq_factor)
  return rope.apply("llama3", _blend(rope, factor, keep), factor=factor, **options)


def check_factor(name: str, factor: float) -> None:
  """Raises ValueError, naming the method, for a factor below 1 or not finite."""
  if not isinstance(factor, (int, float, np.number)) or not (math.isfinite(factor) and factor >= 1):
    raise ValueError(f"{name}: factor must be finite and at least 1, got {factor!r}")


def check_length(name: str, seq_len: int) -> None:
  """Raises ValueError, naming the method, for a sequence of no tokens or of 2^31 and more."""
  check_tokens(f"{name}: seq_len", seq_len)


def fits_float32(scale: float) -> bool:
  """Whether a scale of cos and sin is positive and finite on the device, too."""
  return float(np.finfo(np.float32).tiny) <= scale <= float(np.finfo(np.float32).max)


def _places(rope: Rope) -> np.ndarray:
  """2i / d of each pair: the base theta has frequencies theta^-place."""
  return np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim


def _ntk_multiplier(rope: Rope, alpha: float) -> np.ndarray:
  """What b -> b alpha^(d/(d-2)) does to each frequency: alpha^(-2i/(d-2)), from 1 to 1/alpha."""
  if rope.rotary_dim < 4:
    raise ValueError(f"NTK scaling needs at least 4 rotated channels, got {rope.rotary_dim}")
  return alpha ** (-np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / (rope.rotary_dim - 2))


def _blend(rope: Rope, factor: float, keep: np.ndarray) -> np.ndarray:
  """Frequencies kept where keep >= 1, divided by s where keep <= 0, linear between."""
  keep = np.clip(keep, 0.0, 1.0)
  return rope.inv_freq * keep + rope.inv_freq / factor * (1 - keep)


def _by_parts(rope, factor, name, ramp, beta_fast, beta_slow, truncate) -> np.ndarray:
  rope.require_host(name)
  if not 0 < beta_slow < beta_fast < math.inf:
    raise ValueError(
      f"{name} needs 0 < beta_slow < beta_fast, got beta_slow={beta_slow}, beta_fast={beta_fast}"
    )
  if ramp == "rotation":
    rotations = rope.original_context * rope.inv_freq / TWO_PI
    return _blend(rope, factor, (rotations - beta_slow) / (beta_fast - beta_slow))
  if ramp != "dim":
    raise ValueError(f"{name}.ramp must be 'dim' or 'rotation', got {ramp!r}")
  return _blend(rope, factor, _ramp(rope, name, beta_fast, beta_slow, truncate))


def _ramp(rope: Rope, name: str, fast: float, slow: float, truncate: bool = True) -> np.ndarray:
  """1 for pairs with more rotations than `fast` inside L, 0 below `slow`, linear in the index."""
  if not 0 < slow < fast:
    raise ValueError(f"{name}: rotations must fall from fast to slow, got {fast} and {slow}")
  low, high = _pair_with(rope, name, fast), _pair_with(rope, name, slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  # The released code and HF clamp at d - 1 although pairs end at d/2 - 1: kept, for equality.
  low, high = max(low, 0), min(high, rope.rotary_dim - 1)
  if low == high:
    high += 0.001
  index = np.arange(rope.rotary_dim // 2, dtype=np.float64)
  return np.clip(1 - (index - low) / (high - low), 0.0, 1.0)


def _pair_with(rope: Rope, name: str, rotations: float) -> float:
  """The (fractional) pair that turns so often within L."""
  geometric = rope.theta ** -_places(rope)
  if rope.inv_freq.ndim > 1:
    raise ValueError(f"{name}: apply it before stacking ropes by layer or head")
  if not np.allclose(rope.inv_freq, geometric, rtol=1e-9, atol=0):
    rope.refuse_twice(name)
    # A base that is itself scaled has other rotations than theta says: read them off.
    turning = rope.inv_freq > 0
    log_turns = np.log(rope.original_context * rope.inv_freq[turning] / TWO_PI)
    if len(log_turns) > 1 and np.all(np.diff(log_turns) <= 0):
      return float(np.interp(-math.log(rotations), -log_turns, np.flatnonzero(turning)))
    raise ValueError(f"{name}: needs frequencies that fall from pair to pair")
  return (
    rope.rotary_dim
    * math.log(rope.original_context / (TWO_PI * rotations))
    / (2 * math.log(rope.theta))
  )


def temperature(factor: float, k: float = 1.0) -> float:
  """YaRN's scale of cos and sin, 0.1 k ln(s) + 1."""
  return 0.1 * k * math.log(factor) + 1.0
