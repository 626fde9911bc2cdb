"""How much faster a search is here than one that compiles every candidate anew."""

from __future__ import annotations

import time

import jax
import numpy as np

from rope_jax import evals
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.search import settings
from rope_jax.search.candidate import Space, candidate, redraw
from rope_jax.search.fitness import TokenFitness, rows
from rope_jax.train import loop, sharding, state


def measure(c, workdir: str, candidates: int) -> str:
  """Times candidates of a config's search both ways, on the same model, text and machine.

  'Released': as microsoft/LongRoPE does it, a candidate is another model. Its frequencies are
  constants of a program of its own, compiled for it, and it runs alone.

  Args:
    c: a validated config with a search on tokens.
    workdir: where runs that it starts from are beside.
    candidates: how many; the released way is timed on a tenth of them, at least three.

  Returns:
    A table.

  Raises:
    ValueError: if the fitness is not one of tokens.
  """
  # Programs kept from an earlier measurement would not be compiled.
  jax.config.update("jax_enable_compilation_cache", False)
  stage, entry = settings.stage(c, workdir), settings.fitness_entry(c)
  space = Space(stage.rope, stage.factor, (), c.seed)
  rng = np.random.default_rng(c.seed)
  yarn = space.of_method("yarn").factors
  drawn = [
    candidate(redraw(rng, yarn, rng.random(space.pairs) < 0.3, 1.0, 1.25 * space.factor, 0.01))
    for _ in range(candidates)
  ]
  source = settings.model_config(c)
  mesh = sharding.make_mesh(c.mesh, c.mesh.fsdp * jax.device_count(), must_divide=False)
  with jax.set_mesh(mesh):
    text = loop.load_tokenizer(source, workdir)
    try:
      data = rows(entry, evals.Subject(c, text, None))
    except ValueError as error:
      raise ValueError(f"config.search.fitness: {error}") from error
    if data is None:
      raise ValueError(f"config.search.fitness.type={entry.type!r}: expected one of tokens")
    variables = state.initial_variables(source, mesh, workdir)
    model = Llama(from_config(c))

    def fitness(rope_of, size):
      return TokenFitness(
        model,
        variables,
        mesh,
        data,
        rope_of,
        candidates=size,
        samples=entry.batch_size,
        chunk=c.train.loss_chunk,
      )

    start = time.monotonic()
    ours = fitness(stage.rope_of, c.search.batch_size)
    compiled = time.monotonic() - start
    start, values = time.monotonic(), []
    for i in range(0, candidates, ours.candidates):
      values += ours(drawn[i : i + ours.candidates])
    together = time.monotonic() - start

    alone = max(candidates // 10, 3)
    start = time.monotonic()
    for x, value in zip(drawn[:alone], values):
      losses = _constant(model, c.train.loss_chunk, stage.rope_of(x))
      total = [np.asarray(losses(variables, tokens[None]), np.float64)[0, first - 1 :]
               for tokens, first in zip(data.tokens, data.first)]  # fmt: skip
      np.testing.assert_allclose(np.concatenate(total).mean(), value, rtol=1e-4)
    released = time.monotonic() - start
  rate, released_rate = candidates / together * 60, alone / released * 60
  return (
    f"{len(data.tokens)} samples of {data.tokens.shape[1]:,} tokens, "
    f"{mesh.devices.flat[0].device_kind} x {mesh.size}\n"
    f"a fresh compile for each  {released_rate:8.1f} candidates/min  ({alone} timed)\n"
    f"compiled once, {ours.candidates:2} at a time {rate:8.1f} candidates/min  "
    f"({candidates} timed; and {compiled:.1f} s to compile)\n"
    f"ratio                     {rate / released_rate:8.1f}"
  )


def _constant(model, chunk: int, rope):
  """The loss with the rope a constant of the program, as where a candidate is another model."""
  from rope_jax.model.llama import unembedding
  from rope_jax.train.loss import token_losses

  @jax.jit
  def losses(variables, tokens):
    hidden = model.apply(variables, tokens, jax.tree.map(np.asarray, rope))
    targets = jax.numpy.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return token_losses(hidden, unembedding(variables["params"]), targets, chunk)[:, :-1]

  return losses
