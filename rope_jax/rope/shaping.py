"""Frequency transforms that no factor stretches: another base, or pairs that stop turning.

They compose with one another and with those of `scaling`. Most need (re)training: the model has
not seen its slow pairs stand still. Notation as in `scaling`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rope_jax.rope.rotary import TWO_PI, Rope


def abf(rope: Rope, *, theta: float = 500_000.0) -> Rope:
  """Adjusted base frequency: a larger base, b -> theta, and training at the longer length.

  The new base counts as the rope's own afterwards (`rope.theta`). Source: Xiong et al. (arXiv
  2309.16039) with 500,000; Code Llama uses 1,000,000.
  """
  if not (math.isfinite(theta) and theta >= rope.theta):
    raise ValueError(f"abf.theta must be at least the present base {rope.theta:g}, got {theta}")
  places = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
  out = rope.apply("abf", rope.inv_freq * (theta / rope.theta) ** -places, theta=float(theta))
  return dataclasses.replace(out, theta=float(theta))


def power(rope: Rope, *, exponent: float = 0.1) -> Rope:
  """Giraffe's power basis: each frequency times (1 - i / (d/2))^k, so that the slowest slow most.

  Source: Pal et al. (arXiv 2308.10882), abacusai/Long-Context `interpolate.py` (`scale_power`),
  where k = 0 turns it off. The default is ours; no published one was found.
  """
  if not 0 <= exponent < math.inf:
    raise ValueError(f"power.exponent must be 0 (off) or positive, got {exponent}")
  half = rope.rotary_dim // 2
  shape = (1 - np.arange(half) / half) ** exponent
  return rope.apply("power", rope.inv_freq * shape, exponent=exponent)


def truncated(rope: Rope, *, cutoff: int = 0) -> Rope:
  """Giraffe's truncated basis: frequencies below t become rho, those below t / 8 zero.

  t = 2 pi / c and rho = 2 pi / (16 c): pairs that turn less than once in c tokens. Frequencies
  between rho and t are replaced by the constant rho, as in the release.

  Args:
    rope: frequencies.
    cutoff: c in tokens; 0 is the original context.

  Source: Pal et al. (arXiv 2308.10882), abacusai/Long-Context `truncate_frequency`.
  """
  if cutoff < 0:
    raise ValueError(f"truncated.cutoff must be 0 (the original context) or positive, got {cutoff}")
  t = TWO_PI / (cutoff or rope.original_context)
  inv_freq = np.where(rope.inv_freq < t, t / 16, rope.inv_freq)
  inv_freq = np.where(rope.inv_freq < t / 8, 0.0, inv_freq)
  return rope.apply("truncated", inv_freq, cutoff=cutoff)


def proportional(rope: Rope, factor: float = 1.0, *, proportion: float = 0.75) -> Rope:
  """p-RoPE: the first share p of the pairs keeps its frequencies / s, the rest stands still.

  Not `partial_rotary_factor`, which spaces the frequencies anew over fewer channels: here they
  stay those of the whole head. With s = 1 it is p-RoPE; Hugging Face's 'proportional' has both.
  Source: Barbero et al. (arXiv 2410.06205); transformers 5.23 (Gemma).
  """
  if not (math.isfinite(factor) and factor >= 1):
    raise ValueError(f"proportional: factor must be finite and at least 1, got {factor}")
  if not 0 < proportion <= 1:
    raise ValueError(f"proportional.proportion must be in (0, 1], got {proportion}")
  if rope.head_dim != rope.rotary_dim:
    raise ValueError(
      f"proportional: the rope rotates {rope.rotary_dim} of {rope.head_dim} channels already "
      "(partial_rotary_factor); the two exclude each other"
    )
  keep = int(proportion * rope.head_dim // 2)
  inv_freq = np.where(np.arange(rope.rotary_dim // 2) < keep, rope.inv_freq / factor, 0.0)
  return rope.apply("proportional", inv_freq, factor=factor, proportion=proportion)


def cope(rope: Rope, *, pairs: int = 20, hard: bool = False) -> Rope:
  """CoPE: the slowest c pairs fade out with (1 + cos t) / 2, t from 0 to pi.

  Args:
    rope: frequencies.
    pairs: c, 20 in the release for head_dim 128.
    hard: cut the c pairs to zero instead ('HardClip', the ablation).

  Source: arXiv 2602.05258, hrlics/CoPE `modeling_cope.py`.
  """
  if not 0 < pairs <= rope.rotary_dim // 2:
    raise ValueError(f"cope.pairs must be from 1 to {rope.rotary_dim // 2}, got {pairs}")
  shape = np.ones(rope.rotary_dim // 2)
  shape[-pairs:] = 0.0 if hard else (1 + np.cos(np.linspace(0, np.pi, pairs))) / 2
  return rope.apply("cope", rope.inv_freq * np.maximum(shape, 0.0), pairs=pairs, hard=hard)


def hope(rope: Rope, *, rotations: float = 1.0) -> Rope:
  """HoPE: pairs that turn fewer than `rotations` times within L stand still.

  Only the fast pairs carry positions; the others become position-independent. Source: Chen et
  al. (arXiv 2410.21216), from its abstract and secondary accounts: no code was found, and the
  paper picks the first 'activated' pair by experiment where this takes a number of turns.
  """
  if not 0 < rotations < math.inf:
    raise ValueError(f"hope.rotations must be positive, got {rotations}")
  turns = rope.original_context * rope.inv_freq / TWO_PI
  return rope.apply("hope", np.where(turns < rotations, 0.0, rope.inv_freq), rotations=rotations)


def drope(rope: Rope) -> Rope:
  """DroPE: all frequencies zero, then a short recalibration at the original length.

  Source: arXiv 2512.12167 (Sakana AI); its optional QK-norm is a change of the model, not here.
  """
  return rope.apply("drope", np.zeros_like(rope.inv_freq))
