"""Descent by gradient: the factors as parameters, monotone and bounded by construction.

Nobody published this: frequencies are an argument of the compiled loss, so that its derivative with
respect to them costs as much as that with respect to the weights of a frozen model, two forward
passes more, and says at once for every pair where to go.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.errors import check
from rope_jax.search.candidate import Candidate, Space, candidate

COST = 3  # forward passes that a forward and a backward pass count as
_FLOOR = 1e-4  # smallest share of the range between two pairs: a share of 0 would stay 0


@dataclasses.dataclass(frozen=True)
class Gradient:
  """Adam on the logarithms of the factors' increments.

  ln lambda_i = ln(upper) (share_0 + ... + share_i), shares being a softmax over one more number
  than there are pairs: any numbers give factors that do not fall, from 1 to `upper`. It starts
  from the best of PI, NTK and YaRN, or from what the user gives, as near as positive shares
  allow. A step sees `samples` sequences of the fitness, in turn; the whole fitness is evaluated
  every so many steps, and the best candidate that it was evaluated for wins. The learning rate
  falls to zero as a cosine.

  Attributes:
    steps: of the optimizer.
    learning_rate: largest, of Adam.
    samples: sequences that a step sees; 0: all of them.
    every: steps between evaluations of the whole fitness.
    upper: largest factor; 0: 2 s.
  """

  steps: int = 400
  learning_rate: float = 0.05
  samples: int = 1
  every: int = 10
  upper: float = 0.0

  name = "gradient"

  def check(self, space: Space) -> None:
    """Raises ValueError, naming the key, for options that do not fit."""
    for key in ("steps", "every"):
      check(getattr(self, key) >= 1, f"search.gradient.{key}", getattr(self, key), "at least 1")
    check(self.samples >= 0, "search.gradient.samples", self.samples, "0 (all) or more")
    check(self.learning_rate > 0, "search.gradient.learning_rate", self.learning_rate, "positive")
    check(self.upper == 0 or self.upper > 1, "search.gradient.upper", self.upper, "0 or above 1")
    upper = self._upper(space)
    for given in space.initial:
      check(not given.start_tokens, "search.initial", given.start_tokens, "no start_tokens")
      check(given.monotone and given.factors[0] >= 1 and given.factors[-1] <= upper,
            "search.initial", list(given.factors),
            f"factors from 1 to {upper:g} that do not fall")  # fmt: skip

  def budget(self, space: Space) -> int:
    """Candidates that are evaluated; the steps come on top."""
    return (len(space.initial) or 3) + -(-self.steps // self.every)

  def search(self, space: Space, evaluate, gradient) -> Candidate:
    """The best candidate; a function of the options, the space and the fitness alone.

    Args:
      space: of candidates.
      evaluate: as in `evolution`.
      gradient: (candidate, samples, step) -> the gradient of its mean loss with respect to its
        factors, over the sequences of this step.
    """
    import optax  # slow to import, and every config imports this file

    seeds = list(space.initial) or [space.of_method(name) for name in ("pi", "ntk", "yarn")]
    fitness = evaluate(seeds, f"step 0/{self.steps}")
    best = min(zip(fitness, range(len(seeds))))
    best = (best[0], seeds[best[1]])
    upper = self._upper(space)
    optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))
    parameters = jnp.asarray(parameters_of(best[1].factors, upper), jnp.float32)
    state = optimizer.init(parameters)

    @jax.jit
    def factors_of(parameters):
      return factors(parameters, upper)

    @jax.jit
    def update(parameters, state, d_factors):
      _, pull = jax.vjp(lambda p: factors(p, upper), parameters)
      updates, state = optimizer.update(pull(d_factors)[0], state)
      return optax.apply_updates(parameters, updates), state

    for step in range(1, self.steps + 1):
      at = candidate(np.asarray(factors_of(parameters), np.float64))
      slope = jnp.asarray(gradient(at, self.samples, step), jnp.float32)
      parameters, state = update(parameters, state, slope)
      if step % self.every == 0 or step == self.steps:
        at = candidate(np.asarray(factors_of(parameters), np.float64))
        (value,) = evaluate([at], f"step {step}/{self.steps}")
        if value < best[0]:
          best = (value, at)
    return best[1]

  def _upper(self, space: Space) -> float:
    return self.upper or 2 * space.factor


def factors(parameters: jax.Array, upper: float) -> jax.Array:
  """Factors [pairs] of parameters [pairs + 1]: not falling, from 1 to `upper`."""
  shares = jax.nn.softmax(parameters)[:-1]
  return jnp.exp(np.log(upper) * jnp.minimum(jnp.cumsum(shares), 1.0))


def parameters_of(factors, upper: float) -> np.ndarray:
  """Parameters [pairs + 1] of these factors, but that every increment has some share at least.

  Args:
    factors: [pairs], not falling, from 1 to `upper`.
    upper: bound.
  """
  heights = np.log(np.asarray(factors, np.float64)) / np.log(upper)
  shares = np.maximum(np.diff(np.concatenate([[0.0], heights, [1.0]])), _FLOOR)
  return np.log(shares / shares.sum())
