"""Resonance RoPE: wavelengths rounded to whole tokens (Wang et al., arXiv 2403.00071)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rope_jax.rope.rotary import TWO_PI, Rope


def resonance(rope: Rope) -> Rope:
  """Rounds every wavelength to the nearest integer number of tokens (Algorithm 1).

  Applied last, after any scaling, so that features seen in training repeat exactly: `cos_sin`
  reduces positions modulo the wavelength, as the released cache does. Frequencies of zero stay
  zero. The attention scale does not change.

  Raises:
    ValueError: if a wavelength is below one token and would round to zero.
  """
  wavelengths = np.round(rope.wavelengths)
  if np.any(wavelengths < 1):
    raise ValueError("resonance: a wavelength is shorter than half a token and rounds to zero")
  out = rope.apply("resonance", TWO_PI / wavelengths)
  # Positions are int32: a longer period never comes round.
  return dataclasses.replace(out, period=np.where(wavelengths < 2**31, wavelengths, 0))


def critical_pair(rope: Rope) -> int:
  """The first pair whose wavelength is at least the original context: L tokens show no full turn.

  Pairs before it ('pre-critical') are seen at every angle in training. 46 of 64 for Llama-2.
  Source: Liu et al. (arXiv 2310.05209); section 3.2 of the Resonance paper.
  """
  if rope.inv_freq.ndim > 1:
    raise ValueError("critical_pair: frequencies differ by layer or head; take one row")
  return int(np.sum(rope.wavelengths < rope.original_context))


def common_period(rope: Rope) -> int:
  """Tokens after which all pre-critical pairs of a resonance rope repeat together (their LCM).

  Raises:
    ValueError: if the rope has no whole wavelengths.
  """
  if rope.period is None:
    raise ValueError("common_period: wavelengths are not whole; apply rope.resonance first")
  return math.lcm(*(int(p) for p in rope.period[: critical_pair(rope)]))


def feature_gap(rope: Rope, length: int) -> np.ndarray:
  """How far the angles of new positions are from any angle seen in training, pair by pair.

  The maximum over positions n in [L, length) of the minimum over m in [0, L) of the distance of
  their angles on the circle, in radians, L being the original context. Eq. 8 of the Resonance
  paper as its Theorem 1 uses it (as printed it has a minimum over both).

  Args:
    rope: frequencies [pairs].
    length: tokens, above the original context.

  Returns:
    [pairs] radians, from 0 to pi.

  Raises:
    ValueError: if length does not go past the original context.
  """
  L = rope.original_context
  if rope.inv_freq.ndim > 1:
    raise ValueError("feature_gap: frequencies differ by layer or head; take one row")
  if length <= L:
    raise ValueError(f"feature_gap: length must be above original_context={L}, got {length}")
  period = np.zeros(len(rope.inv_freq)) if rope.period is None else rope.period
  positions = np.arange(length)
  gaps = []
  for frequency, p in zip(rope.inv_freq, period.astype(np.int64)):
    angles = (positions % p if p else positions) * frequency % TWO_PI
    seen = np.sort(angles[:L])
    around = np.concatenate([[seen[-1] - TWO_PI], seen, [seen[0] + TWO_PI]])
    above = np.searchsorted(around, angles[L:])
    above = np.clip(above, 1, len(around) - 1)
    new = angles[L:]
    gaps.append(np.minimum(np.abs(around[above] - new), np.abs(new - around[above - 1])).max())
  return np.array(gaps)
