"""Evolution: the best candidates, mutated and crossed, generation after generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from rope_jax.errors import MOST, check
from rope_jax.search.candidate import Candidate, Space, candidate, mix, new

# evaluate(candidates, title) -> their fitness, lower is better.
Evaluate = Callable[[list[Candidate], str], list[float]]


@dataclasses.dataclass(frozen=True)
class Evolution:
  """Options of every evolutionary search; a method says how candidates come about.

  Attributes:
    population: candidates of the first generation.
    generations: after the first one.
    mutations: new candidates of a generation, each from one parent.
    crossovers: new candidates of a generation, each from two.
    parents: the best of a generation, which stay in the next.
    probability: of a factor to change in a mutation.
    step: grid of the factors.
    upper: largest factor; 0: as the method has it.
  """

  population: int = 64
  generations: int = 40
  mutations: int = 16
  crossovers: int = 16
  parents: int = 32
  probability: float = 0.3
  step: float = 0.01
  upper: float = 0.0

  name = ""  # in config.search
  least = 1  # candidates of the first generation

  def check(self, space: Space) -> None:
    """Raises ValueError, naming the key, for options under which there is nothing to search."""
    where = f"search.{self.name}"
    for key in ("generations", "mutations", "crossovers"):
      check(getattr(self, key) >= 0, f"{where}.{key}", getattr(self, key), "0 or more")
    least = 2 if self.crossovers else 1
    check(self.parents >= least, f"{where}.parents", self.parents, f"at least {least}")
    needed = max(self.least + len(space.initial), self.parents)
    check(self.population >= needed, f"{where}.population", self.population,
          f"at least {needed}, for the parents and the candidates to start from")  # fmt: skip
    check(0 < self.probability <= 1, f"{where}.probability", self.probability, "in (0, 1]")
    check(self.step > 0, f"{where}.step", self.step, "positive")
    low, high = self.bounds(space)
    check(high >= low + self.step, f"{where}.upper", self.upper,
          f"0 or at least {low + self.step:g}, one {where}.step above the least: no factor could "
          "change")  # fmt: skip
    check((high - low) / self.step <= MOST, f"{where}.step", self.step,
          f"so large that there are at most {MOST:,} steps from {low:g} to {high:g}, by "
          f"{where}.upper or the factor s={space.factor:g}")  # fmt: skip
    for given in space.initial:
      check(given.monotone, "search.initial", list(given.factors),
            "factors that do not fall from pair to pair: mutation keeps their order")  # fmt: skip

  def budget(self, space: Space) -> int:
    """Candidates that a whole search evaluates."""
    return self.population + self.generations * (self.mutations + self.crossovers)

  def bounds(self, space: Space) -> tuple[float, float]:
    """Smallest and largest factor that is drawn."""
    raise NotImplementedError

  def first(self, rng, space: Space, seen: set) -> list[Candidate]:
    """The first generation."""
    raise NotImplementedError

  def mutate(self, rng, space: Space, parent: Candidate, seen: set) -> Candidate:
    """A new candidate from one."""
    raise NotImplementedError

  def crossover(self, rng, space: Space, a: Candidate, b: Candidate, seen: set) -> Candidate:
    """A new candidate from two: each factor from one of them, or else a mutation of the first.

    Raises:
      ValueError: if there is no new candidate.
    """
    for _ in range(20):
      start = (a if rng.random() < 0.5 else b).start_tokens
      child = candidate(mix(rng, a.factors, b.factors), start)
      if child.key not in seen:
        seen.add(child.key)
        return child
    return self.mutate(rng, space, a, seen)

  def search(self, space: Space, evaluate: Evaluate, gradient=None) -> Candidate:
    """The best candidate of all; a function of the options, the space and the fitness alone."""
    seen: set = set()
    population = self.first(_rng(space, 0), space, seen)
    fitness = evaluate(population, f"generation 0/{self.generations}")
    for generation in range(1, self.generations + 1):
      rng = _rng(space, generation)
      best = np.argsort(fitness, kind="stable")[: self.parents]
      population, fitness = [population[i] for i in best], [fitness[i] for i in best]
      parents = list(population)
      children = []
      for _ in range(self.mutations):
        children.append(self.mutate(rng, space, parents[rng.integers(len(parents))], seen))
      for _ in range(self.crossovers):
        i, j = sorted(rng.choice(len(parents), 2, replace=False))
        children.append(self.crossover(rng, space, parents[i], parents[j], seen))
      if children:
        fitness = fitness + evaluate(children, f"generation {generation}/{self.generations}")
        population = population + children
    return population[int(np.argmin(fitness))]

  def fill(self, rng, space: Space, seeds: list[Candidate], seen: set) -> list[Candidate]:
    """The seeds, and mutations of them taken in turn, up to `population`."""
    out = []
    for seed in seeds:
      if seed.key not in seen and len(out) < self.population:
        seen.add(seed.key)
        out.append(seed)
    for i in range(self.population - len(out)):
      out.append(self.mutate(rng, space, seeds[i % len(seeds)], seen))
    return out


def _rng(space: Space, generation: int):
  # Of its own for each generation, so that a search may be cut off and taken up anywhere.
  return np.random.default_rng([space.seed, generation])


def drawn(draw: Callable, seen: set, name: str) -> Candidate:
  """`candidate.new` for the method of this name."""
  return new(draw, seen, f"search.{name}")
