"""Rotary-angle distributions, and DPRoPE: the choice per pair that disturbs them least.

Source: Wu et al., Extending Context Window of LLMs from a Distributional Perspective (EMNLP 2024,
arXiv 2410.01490), and the release 1180301012/DPRoPE. They disagree: the paper prints
KL(P_L' || P_L) with a threshold t; the release computes KL(P_L || P_L'), averaged over bins, with
no threshold. The numbers of the paper's Table 3 are the release's direction summed over bins with
t = 0; that is the default here.
"""

from __future__ import annotations

import numpy as np

from rope_jax.rope import scaling
from rope_jax.rope.rotary import TWO_PI, Rope

# What every bin starts with in the release: the smallest normal float16, in counts.
_SMOOTHING = float(np.finfo(np.float16).tiny)

_POSITIONS = 2**16  # counted at a time
# What `dprope` counts: minutes on one core for the pairs of a large head.
_MOST_POSITIONS, _MOST_BINS = 2**22, 2**16

# Transforms that a pair may choose from by name; others are passed as functions.
_CANDIDATES = {
  f.__name__: f
  for f in (
    scaling.pi,
    scaling.ntk,
    scaling.ntk_critical,
    scaling.ntk_mixed,
    scaling.ntk_by_parts,
    scaling.ntk_by_parts_v1,
    scaling.yarn,
    scaling.llama3,
  )
}


def angle_histogram(rope: Rope, length: int, bins: int = 360) -> np.ndarray:
  """Share of the positions 0 .. length-1 whose angle is in each of equal bins of a turn (Eq. 6).

  Args:
    rope: frequencies [pairs].
    length: tokens.
    bins: b; small lengths need fewer than the published 360 or most stay empty.

  Returns:
    [pairs, bins], each row summing to 1.

  Raises:
    ValueError: for no positions or no bins.
  """
  if length < 1 or bins < 1:
    raise ValueError(f"angle_histogram: length={length} and bins={bins} must be positive")
  if rope.inv_freq.ndim > 1:
    raise ValueError("angle_histogram: frequencies differ by layer or head; take one row")
  periods = np.zeros(len(rope.inv_freq), int) if rope.period is None else rope.period.astype(int)
  counts = np.zeros((len(rope.inv_freq), bins))
  # Some positions and one pair at a time: they fit in a cache.
  for first in range(0, length, _POSITIONS):
    positions = np.arange(first, min(first + _POSITIONS, length))
    for i, (frequency, period) in enumerate(zip(rope.inv_freq, periods)):
      if period:  # whole wavelengths: exact, where floats would fall on either side of an edge
        bin_ = positions % period * bins // period
      else:
        bin_ = (positions * frequency % TWO_PI * (bins / TWO_PI)).astype(np.int64)
      # The angle of a full turn less a rounding error falls into the last bin, not past it.
      counts[i] += np.bincount(np.minimum(bin_, bins - 1), minlength=bins)
  return counts / length


def disturbance(
  rope: Rope,
  original: Rope,
  length: int,
  *,
  bins: int = 360,
  direction: str = "reverse",
  reduction: str = "sum",
) -> np.ndarray:
  """How far extension moves the angle distribution of each pair from what training showed.

  Args:
    rope: extended frequencies [pairs], at positions up to `length`.
    original: frequencies of the base, at positions up to its original context.
    length: tokens after extension.
    bins: b.
    direction: 'reverse' is KL(P_L || P_L'), as released and as in Table 3; 'forward' is
      KL(P_L' || P_L), as printed in Eq. 8.
    reduction: over bins: 'sum', or 'mean' as in the release's argmin (1/b of the sum).

  Returns:
    [pairs], not negative up to rounding and smoothing. The paper's D is the mean over pairs.
  """
  if direction not in ("reverse", "forward"):
    raise ValueError(f"dprope.direction must be 'reverse' or 'forward', got {direction!r}")
  if reduction not in ("sum", "mean"):
    raise ValueError(f"dprope.reduction must be 'sum' or 'mean', got {reduction!r}")
  before = angle_histogram(original, original.original_context, bins)
  after = angle_histogram(rope, length, bins)
  log_before = np.log(before + _SMOOTHING / original.original_context)
  log_after = np.log(after + _SMOOTHING / length)
  if direction == "reverse":
    terms = before * (log_before - log_after)
  else:
    terms = after * (log_after - log_before)
  return terms.sum(-1) if reduction == "sum" else terms.mean(-1)


def dprope(
  rope: Rope,
  factor: float,
  *,
  candidates: tuple[str, ...] = ("pi",),
  bins: int = 360,
  threshold: float = 0.0,
  interpolated_dims: int = 0,
  direction: str = "reverse",
  reduction: str = "sum",
) -> Rope:
  """DPRoPE: each pair is extrapolated or interpolated, whichever disturbs its distribution less.

  A pair is interpolated if D(extrapolated) > D(best candidate) + t (Eq. 9, ties extrapolate).

  Args:
    rope: base frequencies [pairs].
    factor: s; the target is s L tokens.
    candidates: what a pair may become, by name ('pi', 'ntk', 'yarn', ...) or as functions
      (rope, factor) -> Rope; their frequencies only, no attention scale. The paper has 'pi'.
    bins: b; scale it down with L where L is well below 4,096.
    threshold: t, in the units of `reduction`.
    interpolated_dims: n-hat, the number of channels (two a pair) to interpolate, those that gain
      most; sets t. The paper has 80 for Llama-2 at 8k and 64 at 16k. 0: by `threshold`.
    direction, reduction: as in `disturbance`.
  """
  scaling.check_factor("dprope", factor)
  pairs = rope.rotary_dim // 2
  if rope.inv_freq.ndim > 1:
    raise ValueError("dprope: apply it before stacking ropes by layer or head")
  if not threshold >= 0:
    raise ValueError(f"dprope.threshold must be 0 or positive, got {threshold}")
  if interpolated_dims and threshold:
    raise ValueError("dprope.interpolated_dims sets the threshold: give one or the other")
  if interpolated_dims % 2 or not 0 <= interpolated_dims <= 2 * pairs:
    raise ValueError(
      f"dprope.interpolated_dims must be an even number up to {2 * pairs}, got {interpolated_dims}"
    )
  if not candidates:
    raise ValueError("dprope.candidates must name at least one transform, e.g. 'pi'")
  if not 1 <= bins <= _MOST_BINS:
    raise ValueError(f"dprope.bins must be from 1 to {_MOST_BINS:,}, got {bins}")
  if factor * rope.original_context > _MOST_POSITIONS:
    raise ValueError(
      f"dprope: a context of factor={factor:g} times original_context={rope.original_context:,} "
      f"must be at most {_MOST_POSITIONS:,} tokens, whose angles are counted one by one"
    )
  made = [_candidate(rope, c, factor) for c in candidates]
  length = round(factor * rope.original_context)
  measured = dict(bins=bins, direction=direction, reduction=reduction)
  extrapolated = disturbance(rope, rope, length, **measured)
  values = np.stack([disturbance(c, rope, length, **measured) for c in made])
  best = values.argmin(0)
  gain = extrapolated - values.min(0)
  if interpolated_dims:
    chosen = np.zeros(pairs, bool)
    chosen[np.argsort(-gain, kind="stable")[: interpolated_dims // 2]] = True
  else:
    chosen = gain > threshold
  frequencies = np.stack([c.inv_freq for c in made])[best, np.arange(pairs)]
  return rope.apply(
    "dprope",
    np.where(chosen, frequencies, rope.inv_freq),
    factor=factor,
    candidates=tuple(c if isinstance(c, str) else c.__name__ for c in candidates),
    threshold=threshold,
    interpolated_dims=interpolated_dims,
    **measured,
  )


def _candidate(rope: Rope, candidate, factor: float) -> Rope:
  if callable(candidate):
    return candidate(rope, factor)
  if candidate not in _CANDIDATES:
    raise ValueError(f"dprope.candidates: {candidate!r} is not one of {', '.join(_CANDIDATES)}")
  return _CANDIDATES[candidate](rope, factor)
