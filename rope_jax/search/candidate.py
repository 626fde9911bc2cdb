"""Candidates: rescale factors lambda of a rope, and the ones that searches start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from rope_jax import rope as rope_lib
from rope_jax.rope import Rope


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What is evaluated.

  Attributes:
    factors: lambda of each pair, by which its frequency is divided.
    start_tokens: n-hat; tokens before it keep the frequencies of the base.
    genes: what else a method passes on, e.g. the critical pair; no part of what is evaluated.
    name: of a candidate that is a method's own, such as 'yarn'.
  """

  factors: tuple[float, ...]
  start_tokens: int = 0
  genes: tuple[float, ...] = ()
  name: str = ""

  @property
  def key(self) -> tuple:
    """Equal for candidates that are the same rope: nothing is evaluated twice."""
    return (self.start_tokens, *(round(x, 9) for x in self.factors))

  @property
  def monotone(self) -> bool:
    """Whether no pair is interpolated more than a slower one."""
    return bool(np.all(np.diff(self.factors) >= 0))


def candidate(factors, start_tokens=0, genes=(), name="") -> Candidate:
  """A Candidate of any sequence of numbers."""
  return Candidate(
    tuple(float(x) for x in factors), int(start_tokens), tuple(float(x) for x in genes), name
  )


@dataclasses.dataclass(frozen=True)
class Space:
  """What a method must know to make candidates.

  Attributes:
    rope: the frequencies that factors divide, [pairs]; its original_context is that before the
      extension.
    factor: s, by which the context grows.
    initial: candidates that the user gives.
    seed: of everything random.
  """

  rope: Rope
  factor: float
  initial: tuple[Candidate, ...] = ()
  seed: int = 0

  @property
  def pairs(self) -> int:
    """Factors of a candidate."""
    return self.rope.rotary_dim // 2

  def of_method(self, name: str) -> Candidate:
    """The factors that 'pi', 'ntk' or 'yarn' divides frequencies by."""
    scaled = rope_lib.SCALINGS[name](self.rope, self.factor)
    return candidate(ordered(self.rope.inv_freq / scaled.inv_freq), name=name)


def ordered(factors) -> np.ndarray:
  """Factors without the last digits, by which equal ones may differ after a division."""
  return np.maximum.accumulate(np.round(np.asarray(factors, np.float64), 12))


def redraw(rng, factors, chosen, low: float, high: float, step: float) -> np.ndarray:
  """Draws the chosen factors anew, uniformly from the grid 1 + k step in [low, high].

  It is what drawing each of them alone and discarding what is not monotone gives, without ever
  discarding: between two factors that stay, ordered independent draws are sorted draws. (But for
  ties, which sorting makes rarer, by the number of steps between.) Where the grid has no point
  between those two, the factors stay.

  Args:
    rng: numpy Generator.
    factors: [pairs], not falling.
    chosen: [pairs] bool.
    low, high: bounds of every drawn factor.
    step: of the grid.
  """
  out = np.array(factors, np.float64)
  edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen, [0]]).astype(int)))
  for start, end in zip(edges[::2], edges[1::2]):
    a = max(low, out[start - 1]) if start else low
    b = min(high, out[end]) if end < len(out) else high
    first, last = np.ceil((a - 1) / step - 1e-9), np.floor((b - 1) / step + 1e-9)
    if first <= last:
      drawn = rng.integers(int(first), int(last) + 1, end - start)
      out[start:end] = np.clip(1 + np.sort(drawn) * step, a, b)  # the grid is rounded, too
  return out


def mix(rng, a, b) -> np.ndarray:
  """Each factor from one of two monotone parents, by a coin, where that keeps the order.

  The parent of the factor before always does, so that the child is monotone whatever the coins.
  """
  out, of_a = np.array(a, np.float64), True
  for i, coin in enumerate(rng.random(len(out)) < 0.5):
    chosen = a[i] if coin else b[i]
    if i and chosen < out[i - 1]:
      coin = of_a
      chosen = a[i] if coin else b[i]
    out[i], of_a = chosen, coin
  return out


def new(draw: Callable[[], Candidate | None], seen: set, where: str, tries: int = 1000):
  """The first drawn candidate that is monotone and not in `seen`, which gets it.

  Raises:
    ValueError: if there is none; `where` names the block of the config.
  """
  for _ in range(tries):
    found = draw()
    if found is not None and found.key not in seen and found.monotone:
      seen.add(found.key)
      return found
  raise ValueError(
    f"config.{where}: {tries} draws gave no new monotone candidate after {len(seen)}; the space is "
    "too small: lower step, raise upper, or ask for fewer candidates"
  )
