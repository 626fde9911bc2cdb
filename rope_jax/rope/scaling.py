"""Frequency transforms, one function per method, computed in float64 on the host.

Each takes a `Rope` and the extension factor s = target / original context, and returns a new
`Rope`; they compose. Options are keyword-only: `config.rope.<method>` is made from the
signature, so a new method needs a function here and a line in `SCALINGS`, nothing else.

Notation: d = head_dim, i = pair index, b = theta, L = original context in tokens.
Every method raises ValueError for a factor below 1 or an option out of range, naming it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from rope_jax.rope.rotary import TWO_PI, Rope


def none(rope: Rope) -> Rope:
  """The model's own frequencies, untouched."""
  return rope


def pi(rope: Rope, factor: float) -> Rope:
  """Position interpolation: all frequencies / s (Chen et al., arXiv 2306.15595). HF 'linear'."""
  _check_factor("pi", factor)
  return rope.apply("pi", rope.inv_freq / factor, factor=factor)


def ntk(rope: Rope, factor: float) -> Rope:
  """NTK-aware: b -> b s^(d/(d-2)), so the slowest pair is interpolated by s, the fastest by 1.

  Source: bloc97, 2023, as in jquesnelle/yarn. HF has no name for it: it is a larger rope_theta.
  """
  _check_factor("ntk", factor)
  return rope.apply("ntk", rope.inv_freq * _ntk_multiplier(rope, factor), factor=factor)


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
  of that repository's `LlamaPartNTKScaledRotaryEmbedding` is an older method, not this one.
  """
  _check_factor("ntk_by_parts", factor)
  inv_freq = _by_parts(rope, factor, "ntk_by_parts", ramp, beta_fast, beta_slow, truncate)
  options = dict(ramp=ramp, beta_fast=beta_fast, beta_slow=beta_slow, truncate=truncate)
  return rope.apply("ntk_by_parts", inv_freq, factor=factor, **options)


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
  _check_factor("yarn", factor)
  inv_freq = _by_parts(rope, factor, "yarn", ramp, beta_fast, beta_slow, truncate)
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
    scale = _mscale(factor, mscale or 1.0) / (_mscale(factor, mscale_all_dim) if mscale else 1.0)
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
  _check_factor("dynamic_ntk", factor)
  if seq_len < 1:
    raise ValueError(f"dynamic_ntk: seq_len must be at least 1 token, got {seq_len}")
  ratio = max(seq_len, rope.original_context) / rope.original_context
  alpha = factor * ratio - (factor - 1)
  options = dict(factor=factor, seq_len=seq_len)
  return rope.apply("dynamic_ntk", rope.inv_freq * _ntk_multiplier(rope, alpha), **options)


def llama3(
  rope: Rope, factor: float, *, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0
) -> Rope:
  """Llama 3.1: by parts in the rotations r = L / wavelength, from `low` to `high` rotations.

  Pairs with r > high_freq_factor are untouched, with r < low_freq_factor divided by s, and
  between them the blend is linear in r. Source: meta-llama, Hugging Face 'llama3'.
  """
  _check_factor("llama3", factor)
  if not 0 < low_freq_factor < high_freq_factor:
    raise ValueError(
      "llama3 needs 0 < low_freq_factor < high_freq_factor, got "
      f"low_freq_factor={low_freq_factor}, high_freq_factor={high_freq_factor}"
    )
  rotations = rope.original_context * rope.inv_freq / TWO_PI
  keep = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)
  options = dict(low_freq_factor=low_freq_factor, high_freq_factor=high_freq_factor)
  return rope.apply("llama3", _blend(rope, factor, keep), factor=factor, **options)


SCALINGS: dict[str, Callable[..., Rope]] = dict(
  none=none,
  pi=pi,
  ntk=ntk,
  ntk_by_parts=ntk_by_parts,
  yarn=yarn,
  dynamic_ntk=dynamic_ntk,
  llama3=llama3,
)


def _check_factor(name: str, factor: float) -> None:
  if not (math.isfinite(factor) and factor >= 1):
    raise ValueError(f"{name}: factor must be finite and at least 1, got {factor}")


def _ntk_multiplier(rope: Rope, alpha: float) -> np.ndarray:
  """What b -> b alpha^(d/(d-2)) does to each frequency: alpha^(-2i/(d-2)), from 1 to 1/alpha."""
  if rope.head_dim < 4:
    raise ValueError(f"NTK scaling needs head_dim >= 4, got {rope.head_dim}")
  return alpha ** (-np.arange(0, rope.head_dim, 2, dtype=np.float64) / (rope.head_dim - 2))


def _blend(rope: Rope, factor: float, keep: np.ndarray) -> np.ndarray:
  """Frequencies kept where keep >= 1, divided by s where keep <= 0, linear between."""
  keep = np.clip(keep, 0.0, 1.0)
  return rope.inv_freq * keep + rope.inv_freq / factor * (1 - keep)


def _by_parts(rope, factor, name, ramp, beta_fast, beta_slow, truncate) -> np.ndarray:
  if not 0 < beta_slow < beta_fast:
    raise ValueError(
      f"{name} needs 0 < beta_slow < beta_fast, got beta_slow={beta_slow}, beta_fast={beta_fast}"
    )
  if ramp == "rotation":
    rotations = rope.original_context * rope.inv_freq / TWO_PI
    return _blend(rope, factor, (rotations - beta_slow) / (beta_fast - beta_slow))
  if ramp != "dim":
    raise ValueError(f"{name}.ramp must be 'dim' or 'rotation', got {ramp!r}")

  def pair_with(rotations):  # the (fractional) pair that turns so often within L
    return (
      rope.head_dim
      * math.log(rope.original_context / (TWO_PI * rotations))
      / (2 * math.log(rope.theta))
    )

  low, high = pair_with(beta_fast), pair_with(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  # The released code and HF clamp at d - 1 although pairs end at d/2 - 1: kept, for equality.
  low, high = max(low, 0), min(high, rope.head_dim - 1)
  if low == high:
    high += 0.001
  index = np.arange(rope.head_dim // 2, dtype=np.float64)
  return _blend(rope, factor, 1 - (index - low) / (high - low))


def _mscale(factor: float, k: float) -> float:
  return 0.1 * k * math.log(factor) + 1.0
