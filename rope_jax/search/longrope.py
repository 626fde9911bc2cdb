"""LongRoPE's search, as in the paper and as released.

Sources: Ding et al. (arXiv 2402.13753) Algorithm 1 and Table 4; microsoft/LongRoPE
`evolution/algorithms` (`dim_mono`, `dim_piece_mono`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rope_jax import rope as rope_lib
from rope_jax.errors import check
from rope_jax.search.candidate import Candidate, Space, candidate, ordered, redraw
from rope_jax.search.evolution import Evolution, drawn

N_HAT = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class LongRoPE(Evolution):
  """The paper's: from PI, NTK and YaRN, factors from 1 to 1.25 s, n-hat searched with them.

  What the paper leaves open: a mutation draws a factor uniformly from the whole range, and what is
  not monotone counts as never drawn (see `candidate.redraw`); a child takes each factor from one
  of its parents by a coin.

  Attributes:
    start_tokens: values of n-hat. Above 0 it fits no other library's format: (0,) for factors that
      are to be exported.
  """

  start_tokens: tuple[int, ...] = N_HAT

  name = "longrope"
  least = 3

  def check(self, space: Space) -> None:
    super().check(space)
    n = self.start_tokens
    check(n and min(n) >= 0, "search.longrope.start_tokens", n, "numbers of tokens, e.g. (0,)")

  def bounds(self, space: Space) -> tuple[float, float]:
    """From 1 to 1.25 s."""
    return 1.0, self.upper or 1.25 * space.factor

  def first(self, rng, space: Space, seen: set) -> list[Candidate]:
    """What the user gives, PI, NTK and YaRN, then mutations of them."""
    seeds = [space.of_method(name) for name in ("pi", "ntk", "yarn")]
    return self.fill(rng, space, [*space.initial, *seeds], seen)

  def mutate(self, rng, space: Space, parent: Candidate, seen: set) -> Candidate:
    """Each factor and n-hat drawn anew with some probability."""

    def draw():
      chosen = rng.random(space.pairs + 1) < self.probability
      factors = redraw(rng, parent.factors, chosen[1:], *self.bounds(space), self.step)
      start = rng.choice(self.start_tokens) if chosen[0] else parent.start_tokens
      return candidate(factors, start)

    return drawn(draw, seen, self.name)


@dataclasses.dataclass(frozen=True)
class Released(Evolution):
  """The release's `dim_mono`: from YaRN alone, no n-hat, factors up to 1 + s, its mutation.

  YaRN's ramp blends the factors themselves, 1 and s, not the frequencies; a list that the user
  gives takes its place. A mutation goes through the pairs and draws some between their neighbours
  on a grid that starts at the lower one, again and again until the list is monotone and new. A
  crossover copies factors of the second parent until the list is monotone and new, which is mostly
  after the first one.

  Attributes:
    tries: walks of a crossover over all pairs, before a mutation of the first parent takes its
      place.
  """

  tries: int = 20

  name = "longrope_released"

  def bounds(self, space: Space) -> tuple[float, float]:
    """From 1 to 1 + s."""
    return 1.0, self.upper or 1.0 + space.factor

  def first(self, rng, space: Space, seen: set) -> list[Candidate]:
    """One seed (and what is not the user's to choose, in a recovery), and mutations."""
    return self.fill(rng, space, [self.seed(space), *map(self.given, space.initial[1:])], seen)

  def given(self, initial: Candidate) -> Candidate:
    """A candidate that was given, with the genes of the method."""
    return initial

  def seed(self, space: Space) -> Candidate:
    """The list of the user, or else s (1 - m) + m, m being the share of YaRN's that stays."""
    if space.initial:
      return self.given(space.initial[0])
    parts = rope_lib.ntk_by_parts(space.rope, space.factor).inv_freq / space.rope.inv_freq
    s = space.factor
    kept = (parts - 1 / s) / (1 - 1 / s)
    return candidate(ordered(s * (1 - kept) + kept), name="yarn, factors blended")

  def mutate(self, rng, space: Space, parent: Candidate, seen: set) -> Candidate:
    """A walk over the pairs that goes on from its own result until that is monotone and new."""
    factors = np.array(parent.factors)

    def draw():
      for i in range(space.pairs):
        if rng.random() < self.probability:
          self.redraw(rng, space, factors, i)
      return candidate(factors)

    return drawn(draw, seen, self.name)

  def redraw(self, rng, space: Space, factors: np.ndarray, i: int) -> None:
    """Draws one factor, in place."""
    low, high = self.bounds(space)
    if i == 0:
      grid = np.arange(low, factors[1], self.step)
    elif i == space.pairs - 1:
      grid = np.arange(factors[i - 1], high + self.step, self.step)
    else:
      grid = np.arange(factors[i - 1], factors[i + 1] + self.step, self.step)
    if len(grid):
      factors[i] = grid[rng.integers(len(grid))]

  def crossover(self, rng, space: Space, a: Candidate, b: Candidate, seen: set) -> Candidate:
    """Factors of b copied to a until it is monotone and new."""
    child = np.array(a.factors)
    for _ in range(self.tries):
      for i in range(space.pairs):
        if rng.random() < self.probability:
          if rng.random() < 0.5:
            child[i] = b.factors[i]
          found = candidate(child)
          if found.monotone and found.key not in seen:
            seen.add(found.key)
            return found
    return self.mutate(rng, space, a, seen)


@dataclasses.dataclass(frozen=True)
class Pieces(Released):
  """The release's `dim_piece_mono`: two more genes a < b, pairs up to a get 1, those above b get s.

  They walk by normal steps. As in the release, a pair becomes 1 or s only when it is drawn, and the
  last two pairs never are.

  Attributes:
    deviation: of a step of a and b, in pairs.
  """

  deviation: float = 2.0

  name = "longrope_pieces"

  def check(self, space: Space) -> None:
    super().check(space)
    key = "search.longrope_pieces.deviation"
    check(self.deviation > 0, key, self.deviation, "positive")

  def seed(self, space: Space) -> Candidate:
    """That of `Released`, with a = b = 0."""
    return self.given(super().seed(space))

  def given(self, initial: Candidate) -> Candidate:
    """A candidate with a = b = 0."""
    return dataclasses.replace(initial, genes=(0.0, 0.0))

  def mutate(self, rng, space: Space, parent: Candidate, seen: set) -> Candidate:
    """A walk that goes on until its result is monotone and new."""
    factors, genes = np.array(parent.factors), list(parent.genes)

    def draw():
      while True:
        which = 0 if rng.random() < 0.5 else 1
        genes[which] = float(int(rng.normal(genes[which], self.deviation)))
        if 0 <= genes[0] < genes[1] < space.pairs:
          break
      for i in range(space.pairs - 2):
        if rng.random() < self.probability:
          if i <= genes[0]:
            factors[i] = 1.0
          elif i > genes[1]:
            factors[i] = space.factor
          else:
            self.redraw(rng, space, factors, i)
      return candidate(factors, genes=genes)

    return drawn(draw, seen, self.name)

  def crossover(self, rng, space: Space, a: Candidate, b: Candidate, seen: set) -> Candidate:
    """As in `Released`, over the genes too, which are copied together."""
    child, genes = np.array(a.factors), a.genes
    for _ in range(self.tries):
      for i in range(-2, space.pairs):
        if rng.random() < self.probability:
          if rng.random() < 0.5:
            if i < 0:
              genes = b.genes
            else:
              child[i] = b.factors[i]
          found = candidate(child, genes=genes)
          if found.monotone and found.key not in seen:
            seen.add(found.key)
            return found
    return self.mutate(rng, space, a, seen)
