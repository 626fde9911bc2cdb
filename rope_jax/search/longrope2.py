"""LongRoPE2's search: the critical pair, and the factors from it on; a closed form below it.

Sources: Shang et al. (arXiv 2502.20082) Algorithms 1 and 2; microsoft/LongRoPE 5e669a5
`evolution/algorithms/dim_mono.py` and J-shang/LongRoPE `genetic_base.py` ('released').
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rope_jax import rope as rope_lib
from rope_jax.errors import check
from rope_jax.search.candidate import Candidate, Space, candidate, mix, redraw
from rope_jax.search.evolution import Evolution, drawn


def below(critical: int, factor: float) -> np.ndarray:
  """lambda_i = lambda_c^(i / c) for pairs i < c: NTK that meets the searched factors at c."""
  return factor ** (np.arange(critical) / critical)


def critical_range(space: Space) -> tuple[int, int]:
  """The first pairs that turn fewer than ten times, and less than once, in the original context."""
  rope = space.rope
  ten = int(np.sum(rope.wavelengths < rope.original_context / 10))
  last = min(max(rope_lib.critical_pair(rope), 1), space.pairs - 1)
  return min(max(ten, 1), last), last


@dataclasses.dataclass(frozen=True)
class LongRoPE2(Evolution):
  """The paper's: critical pairs from ten periods to one, factors from s to 2 s from there on.

  The first candidates are one for each critical pair, with one whole factor from s to 2 s for all
  that follow. A child has the critical pair of its first parent.
  """

  name = "longrope2"

  def check(self, space: Space) -> None:
    check(not space.initial, "search.initial", "...",
          f"'' for search.method={self.name!r}: pairs below the critical one have a closed "
          "form")  # fmt: skip
    super().check(space)

  def bounds(self, space: Space) -> tuple[float, float]:
    """From s to 2 s."""
    return space.factor, self.upper or 2 * space.factor

  def first(self, rng, space: Space, seen: set) -> list[Candidate]:
    """A candidate for each critical pair, then mutations of them."""
    low, high = self.bounds(space)
    seeds = []
    first, last = critical_range(space)
    for c in range(first, last + 1):
      whole = math.ceil(low), math.floor(high)
      factor = float(rng.integers(whole[0], whole[1] + 1)) if whole[0] <= whole[1] else low
      seeds.append(self.express(c, [factor] * (space.pairs - c)))
    rng.shuffle(seeds)  # where the population is smaller than they are many
    return self.fill(rng, space, seeds, seen)

  def express(self, critical: int, tail) -> Candidate:
    """The candidate with these genes."""
    return candidate(np.concatenate([below(critical, tail[0]), tail]), genes=(critical,))

  def mutate(self, rng, space: Space, parent: Candidate, seen: set) -> Candidate:
    """Factors from the critical pair on drawn anew with some probability, then those below."""
    c = int(parent.genes[0])

    def draw():
      chosen = rng.random(space.pairs - c) < self.probability
      tail = redraw(rng, parent.factors[c:], chosen, *self.bounds(space), self.step)
      return self.express(c, tail)

    return drawn(draw, seen, self.name)

  def crossover(self, rng, space: Space, a: Candidate, b: Candidate, seen: set) -> Candidate:
    """Factors from the critical pair of a on, each from one parent; from a where b's are below."""
    c, low = int(a.genes[0]), self.bounds(space)[0]
    other = np.maximum(b.factors[c:], low)
    for _ in range(20):
      child = self.express(c, mix(rng, a.factors[c:], other))
      if child.key not in seen:
        seen.add(child.key)
        return child
    return self.mutate(rng, space, a, seen)


@dataclasses.dataclass(frozen=True)
class Released(LongRoPE2):
  """As released: one critical pair, eight seeds, lists that rise strictly, a last step of up to 4.

  The seeds are 2 s, 2 s + 3 s / 16, ... at the critical pair and s / 160 more at each that follows
  (2 s, + 3 and + 0.1 in the release, for Llama-3's s = 16), and the first generation is twice the
  population: each candidate is a mutation of the one eight before it. A mutation is a walk as in
  `longrope.Released`; the factors below follow at each change.

  Attributes:
    critical: the critical pair; 0: one before the theoretical one, as in the release.
    tries: walks of a crossover, before a mutation of the first parent takes its place.
    last_rise: by how much the last factor may be above the one before it; 4 in the release.
  """

  critical: int = 0
  tries: int = 20
  last_rise: float = 4.0

  name = "longrope2_released"
  least = 4

  def check(self, space: Space) -> None:
    c = self._critical(space)
    check(0 < c < space.pairs - 1, "search.longrope2_released.critical", self.critical,
          f"from 1 to {space.pairs - 2}: model.head_dim={space.rope.head_dim} leaves "
          f"{space.pairs} pairs")  # fmt: skip
    super().check(space)
    largest = self._tail(space, 7)[-1]
    check(self.bounds(space)[1] >= largest, "search.longrope2_released.upper", self.upper,
          f"0 or at least {largest:g}, the end of the largest seed")  # fmt: skip

  def budget(self, space: Space) -> int:
    """Its first generation is twice the population."""
    return super().budget(space) + self.population

  def bounds(self, space: Space) -> tuple[float, float]:
    """From s to somewhat above the largest seed."""
    return space.factor, self.upper or max(3.5 * space.factor, self._tail(space, 7)[-1])

  def first(self, rng, space: Space, seen: set) -> list[Candidate]:
    """Eight seeds and a chain of mutations from each."""
    out = []
    for j in range(8):
      seed = self.express(self._critical(space), self._tail(space, j))
      seen.add(seed.key)
      out.append(seed)
    for i in range(2 * self.population - len(out)):
      out.append(self.mutate(rng, space, out[i], seen))
    return out

  def mutate(self, rng, space: Space, parent: Candidate, seen: set) -> Candidate:
    """A walk that goes on from its own result until that rises strictly and is new."""
    c, (low, high) = self._critical(space), self.bounds(space)
    tail = np.array(parent.factors[c:])
    last = len(tail) - 1

    def draw():
      for i in range(last + 1):
        if rng.random() < self.probability:
          before = tail[i - 1] if i else tail[0] ** ((c - 1) / c)
          after = tail[i + 1] if i < last else tail[i - 1] + self.last_rise
          a, b = (min(max(x, low), high) for x in (before, after))
          first, end = math.ceil(a / self.step - 1e-8), math.floor(b / self.step + 1e-8)
          if first <= end:
            tail[i] = rng.integers(first, end + 1) * self.step
      return self._rising(c, tail)

    return drawn(draw, seen, self.name)

  def crossover(self, rng, space: Space, a: Candidate, b: Candidate, seen: set) -> Candidate:
    """Factors of b copied to a until it rises strictly and is new."""
    c = self._critical(space)
    tail, other = np.array(a.factors[c:]), b.factors[c:]
    for _ in range(self.tries):
      for i in range(len(tail)):
        if rng.random() < self.probability:
          if rng.random() < 0.5:
            tail[i] = other[i]
          child = self._rising(c, tail)
          if child is not None and child.key not in seen:
            seen.add(child.key)
            return child
    return self.mutate(rng, space, a, seen)

  def _rising(self, critical: int, tail) -> Candidate | None:
    return self.express(critical, tail) if np.all(np.diff(tail) > 0) else None

  def _tail(self, space: Space, j: int) -> np.ndarray:
    s = space.factor
    return s * (2 + 3 / 16 * j) + s / 160 * np.arange(space.pairs - self._critical(space))

  def _critical(self, space: Space) -> int:
    return self.critical or rope_lib.critical_pair(space.rope) - 1
