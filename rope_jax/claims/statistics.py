"""What a few seeds say: means with intervals, and differences of pairs that share a seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over seeds with its 95% interval by Student's t; of one seed there is no interval."""

  mean: float
  low: float
  high: float
  seeds: int

  @property
  def sign(self) -> int:
    """1 or -1 where the interval is on one side of zero; 0 where it holds it, or is none."""
    return int(self.low > 0) - int(self.high < 0)

  def says(self, yes: str, no: str) -> str:
    """One of two things, by the sign, or why neither."""
    unknown = "is not told apart" if self.seeds > 1 else "is of one seed, so not known"
    return {1: yes, -1: no, 0: unknown}[self.sign]

  def below(self) -> str:
    """Of a reduction: 'x% below' with the interval, or 'x% above' where it is an increase."""
    if self.mean >= 0:
      return f"{self.shown()}% below"
    return f"{Interval(-self.mean, -self.high, -self.low, self.seeds).shown()}% above"

  def shown(self, digits: int = 2, signed: bool = False) -> str:
    """'mean [low, high]', or the mean alone."""
    plus = "+" if signed else ""
    mean = f"{self.mean:{plus}.{digits}f}"
    if math.isinf(self.low):
      return mean
    return f"{mean} [{self.low:{plus}.{digits}f}, {self.high:{plus}.{digits}f}]"


def interval(values: Sequence[float]) -> Interval:
  """Of values by seed.

  Raises:
    ValueError: for none.
  """
  x = np.asarray(values, np.float64)
  if not x.size:
    raise ValueError("an interval of no values")
  if x.size == 1:
    return Interval(float(x[0]), -math.inf, math.inf, 1)
  half = float(stats.t.ppf((1 + LEVEL) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
  return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, x.size)


def reduction(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
  """By how many per cent ours is below theirs, pair by pair: positive where ours is the lower."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  if ours.shape != theirs.shape:
    raise ValueError(f"pairs of {ours.shape} and {theirs.shape} values")
  return interval(100 * (1 - ours / theirs))


def slope(x: Sequence[float], by_seed: Sequence[Sequence[float]]) -> Interval:
  """Of the least squares line through each seed's values at x, the mean over seeds."""
  return interval([float(np.polyfit(np.asarray(x, np.float64), y, 1)[0]) for y in by_seed])
