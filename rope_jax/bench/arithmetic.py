"""What the tables compute from measured numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def ratio(ours: float, peer: float) -> float:
  """Of two times or two sizes: above 1 if ours is faster, or smaller."""
  return peer / ours


def share_of_peak(flops: float, seconds: float, peak: float) -> float:
  """FLOP/s of a program as a share of the FLOP/s of a matrix product."""
  return flops / seconds / peak


def per_doubling(lengths: Sequence[int], sizes: Sequence[float]) -> float:
  """By what the second of two sizes exceeds the first, for each doubling of the length."""
  return (sizes[1] / sizes[0]) ** (1 / math.log2(lengths[1] / lengths[0]))


def fit_cost(lengths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
  """The (a, b) of a L + b L^2 with the least sum of squared relative errors, and the largest error.

  Args:
    lengths: tokens L, at least two.
    seconds: of each.

  Returns:
    a in seconds a token, b in seconds a token squared, and the largest relative residual.
  """
  L, t = np.asarray(lengths, np.float64), np.asarray(seconds, np.float64)
  terms = np.stack([L / t, L**2 / t], axis=1)
  scale = terms.max(axis=0)  # columns of like size are better conditioned
  a, b = np.linalg.lstsq(terms / scale, np.ones_like(t), rcond=None)[0] / scale
  return float(a), float(b), float(np.abs(terms @ [a, b] - 1).max())


def digits(x: float, n: int = 3) -> str:
  """A number with at least n significant digits, 12,345 in full."""
  if not x or not math.isfinite(x):
    return f"{x:g}"
  decimals = max(0, n - 1 - math.floor(math.log10(abs(x))))
  return f"{x:,.{decimals}f}"


def size(count: float) -> str:
  """Bytes for people."""
  unit, name = next((u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u[0]),
                    (1, "B"))  # fmt: skip
  return f"{digits(count / unit)} {name}"
