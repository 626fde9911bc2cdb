"""Counts what evaluations compute, over all lives of a command: work that a kill makes twice."""

import os

from rope_jax.model import generate
from rope_jax.train import step


def install(path: str) -> None:
  """From now on each batch that a model runs on for an evaluation is a line of this file."""
  file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

  def counts(function):
    def counted(*args, **kwargs):
      os.write(file, b"batch\n")
      return function(*args, **kwargs)

    return counted

  def makes(make):
    return lambda *args, **kwargs: counts(make(*args, **kwargs))

  step.token_loss, step.token_predictions = makes(step.token_loss), makes(step.token_predictions)
  generate.Generator.__call__ = counts(generate.Generator.__call__)
