"""LongRoPE and LongRoPE2: a factor of its own for each pair, found by search.

Sources: Ding et al. (arXiv 2402.13753) and microsoft/LongRoPE; Shang et al. (arXiv 2502.20082)
and microsoft/nnscaler examples/longrope2; Hugging Face 'longrope'. Notation as in `scaling`.

All are functions of the length of the sequence: up to L tokens the short factors, above L (not at
L) the long ones, decided anew for each call. Keys cached under one list do not fit the other.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rope_jax.rope.limits import check_tokens
from rope_jax.rope.resonance import critical_pair
from rope_jax.rope.rotary import Rope
from rope_jax.rope.scaling import check_factor, check_length, fits_float32, temperature


def longrope(
  rope: Rope,
  factor: float,
  *,
  seq_len: int,
  long_factor: tuple[float, ...] = (),
  short_factor: tuple[float, ...] = (),
  start_tokens: int = 0,
  attention: str = "su",
) -> Rope:
  """LongRoPE: each frequency divided by its own factor lambda_i.

  Args:
    rope: base frequencies.
    factor: s, for the attention scale only.
    seq_len: tokens of the sequence; the long factors hold above L.
    long_factor: lambda, [pairs] or [layers, pairs].
    short_factor: the same for up to L tokens; all ones if empty.
    start_tokens: n-hat; tokens before it keep the frequencies of `rope`, unscaled, and its
      attention scale, as in the release. Angles then depend on more than relative position.
    attention: scale of cos and sin at any length: 'su' is sqrt(1 + ln s / ln L), 'yarn' is
      0.1 ln s + 1, or a number.
  """
  if start_tokens < 0:
    raise ValueError(f"longrope.start_tokens must be 0 or positive, got {start_tokens}")
  if start_tokens:
    check_tokens("longrope.start_tokens", start_tokens)
  out = _by_length(rope, "longrope", factor, seq_len, long_factor, short_factor, attention)
  if not start_tokens:
    return out
  name, options = out.history[-1]  # what the saved rope says of itself must include them
  history = (*rope.history, (name, dict(options, start_tokens=start_tokens)))
  return dataclasses.replace(out, short=rope, start_tokens=start_tokens, history=history)


def longrope2(
  rope: Rope,
  factor: float,
  *,
  seq_len: int,
  critical: int = 0,
  tail: tuple[float, ...] = (),
  attention: str = "su",
) -> Rope:
  """LongRoPE2: lambda_i = lambda_c^(i / c) below the critical pair c; from c on, searched factors.

  Up to L tokens the rope is untouched.

  Args:
    rope: base frequencies.
    factor: s.
    seq_len: tokens of the sequence.
    critical: c; 0 is the theoretical one, the first pair whose wavelength reaches L (Llama-3 8B:
      35; its searched factors have 33).
    tail: lambda from pair c on, not falling and at least s; s for all if empty.
    attention: as in `longrope`.
  """
  check_factor("longrope2", factor)
  pairs = rope.rotary_dim // 2
  if rope.inv_freq.ndim > 1:
    raise ValueError("longrope2: apply it before stacking ropes by layer or head")
  c = critical or critical_pair(rope)
  if not 0 < c < pairs:
    raise ValueError(f"longrope2.critical must be from 1 to {pairs - 1}, got {c}")
  above = np.asarray(tail if len(tail) else [factor] * (pairs - c), np.float64)
  if above.shape != (pairs - c,):
    raise ValueError(
      f"longrope2.tail must have {pairs - c} factors, for pairs {c} to {pairs - 1} of head_dim, "
      f"got {len(above)}"
    )
  if np.any(np.diff(above) < 0) or above[0] < factor:
    raise ValueError(
      f"longrope2.tail must not fall and be at least factor={factor:g}, got {tuple(above)}"
    )
  long_factor = np.concatenate([above[0] ** (np.arange(c) / c), above])
  return _by_length(rope, "longrope2", factor, seq_len, long_factor, (), attention)


def dynamic_longrope(
  rope: Rope,
  factor: float,
  *,
  seq_len: int,
  long_factor: tuple[float, ...] = (),
  attention: str = "su",
) -> Rope:
  """LongRoPE factors shrunk to the length: lambda' = 1 + (lambda - 1)(s' - 1) / (s - 1).

  s' = max(1, n / L) for n = `seq_len` tokens: untouched up to L, the searched factors at s L, more
  beyond. The attention scale is that of s. Deviation: without the maximum the release goes below
  one for short inputs. Source: microsoft/LongRoPE, `DynamicLongRoPEScaledRotaryEmbedding`.
  """
  check_factor("dynamic_longrope", factor)
  check_length("dynamic_longrope", seq_len)
  full = _factors(rope, "dynamic_longrope.long_factor", long_factor)
  s = max(seq_len / rope.original_context, 1.0)
  factors = 1 + (full - 1) * (s - 1) / (factor - 1) if factor > 1 else np.ones_like(full)
  scale = _attention(rope, "dynamic_longrope", attention, factor)
  options = dict(factor=factor, seq_len=seq_len, long_factor=full, attention=attention)
  return rope.apply("dynamic_longrope", rope.inv_freq / factors, scale, **options)


def _by_length(
  rope: Rope, name: str, factor: float, seq_len: int, long_factor, short_factor, attention
) -> Rope:
  check_factor(name, factor)
  check_length(name, seq_len)
  options = dict(
    long_factor=_factors(rope, f"{name}.long_factor", long_factor),
    short_factor=_factors(rope, f"{name}.short_factor", short_factor, default=1.0),
    attention=attention,
  )
  # Of one shape, so that the switch never changes that of the rope: a row where layers have rows.
  long, short = np.broadcast_arrays(options["long_factor"], options["short_factor"])
  factors = long if seq_len > rope.original_context else short
  scale = _attention(rope, name, attention, factor)
  with np.errstate(over="ignore"):  # `apply` refuses what is not finite
    inv_freq = rope.inv_freq / factors
  return rope.apply(name, inv_freq, scale, factor=factor, seq_len=seq_len, **options)


def _factors(rope: Rope, key: str, factors, default: float | None = None) -> np.ndarray:
  pairs = rope.rotary_dim // 2
  if default is not None and not np.size(factors):
    return np.full(pairs, default)
  try:
    out = np.asarray(factors, np.float64)
  except (TypeError, ValueError):
    out = np.empty(0)
  if out.ndim not in (1, 2) or out.shape[-1] != pairs:
    raise ValueError(
      f"{key} must have a factor for each of the {pairs} pairs, half of head_dim times "
      "partial_rotary_factor (or a row of them for each layer), got "
      f"{out.shape[-1] if out.ndim == 1 else out.shape}"
    )
  if not (np.all(np.isfinite(out)) and np.all(out > 0)):
    raise ValueError(f"{key} must be finite and positive, got {out.tolist()}")
  return out


def _attention(rope: Rope, name: str, policy, factor: float) -> float:
  if policy == "su":
    if rope.original_context < 2:
      raise ValueError(f"{name}.attention='su' needs an original_context above 1 token")
    return math.sqrt(1 + math.log(factor) / math.log(rope.original_context)) if factor > 1 else 1.0
  if policy == "yarn":
    return temperature(factor)
  try:
    scale = float(policy)
  except (TypeError, ValueError):
    scale = -1.0
  if not fits_float32(scale):
    raise ValueError(f"{name}.attention must be 'su', 'yarn' or a positive number, got {policy!r}")
  return scale
