"""Resonance RoPE: wavelengths rounded to whole tokens (Wang et al., arXiv 2403.00071)."""

from __future__ import annotations

import numpy as np

from rope_jax.rope.rotary import TWO_PI, Rope


def resonance(rope: Rope) -> Rope:
  """Rounds every wavelength to the nearest integer number of tokens (Algorithm 1).

  Applied last, after any scaling, so that features seen in training repeat exactly. Frequencies
  of zero stay zero. The attention scale does not change.

  Raises:
    ValueError: if a wavelength is below one token and would round to zero.
  """
  with np.errstate(divide="ignore"):
    wavelengths = np.round(TWO_PI / rope.inv_freq)
  if np.any(wavelengths < 1):
    raise ValueError("resonance: a wavelength is shorter than half a token and rounds to zero")
  return rope.apply("resonance", TWO_PI / wavelengths)
