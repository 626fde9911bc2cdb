"""How good candidates are: the mean loss of some tokens, of a batch of candidates at a time.

The frequencies are an argument of the compiled function, a rope for each row of its batch: it is
compiled once, and rows are shared out among the devices of the mesh as in training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax import compiler, evals
from rope_jax.rope import Rope
from rope_jax.train import sharding
from rope_jax.train import step as step_lib

# Tokens of a batch beyond which more at a time bring nothing.
_TOKENS = dict(cpu=8192, gpu=65_536, tpu=131_072)


class Rows(NamedTuple):
  """Sequences and what of them counts.

  Attributes:
    tokens: [N, T] int32.
    first: [N], the first token that is scored.
  """

  tokens: np.ndarray
  first: np.ndarray


def rows(entry, subject: evals.Subject) -> Rows | None:
  """The sequences of a fitness of tokens (`perplexity`, `needle`), None of another type."""
  module = evals.module(entry.type)
  if not hasattr(module, "rows"):
    return None
  (length,) = entry.lengths
  found = module.rows(entry, subject, length)
  return Rows(np.stack([tokens for tokens, _ in found]), np.array([first for _, first in found]))


class TokenFitness:
  """Mean loss in nats over the scored tokens of all rows, for a batch of candidates at a time.

  Attributes:
    candidates: at a time.
  """

  def __init__(
    self,
    model,
    variables: dict,
    mesh,
    data: Rows,
    rope_of: Callable,
    *,
    candidates: int,
    samples: int,
    chunk: int,
  ):
    """What is compiled is compiled here.

    Args:
      model: a Llama.
      variables: of it.
      mesh: that is set.
      data: the rows.
      rope_of: Candidate -> host Rope.
      candidates: at a time; 0: as many as memory allows and bring something.
      samples: rows of one candidate at a time.
      chunk: as in `token_losses`.

    Raises:
      ValueError: if not even one candidate fits, or the number asked for does not.
    """
    self._variables, self._mesh, self._rope_of = variables, mesh, rope_of
    self._model, self._chunk = model, chunk
    self._data = data
    self._samples = min(samples, len(data.tokens))
    self._scored = int((data.tokens.shape[1] - data.first).sum())
    self._losses = step_lib.token_loss(model, chunk=chunk, rope_by_row=True)
    self._descend = None
    self.candidates, self._compiled = self._compile(candidates)

  def __call__(self, group: list) -> list[float]:
    """The fitness of at most `candidates` candidates."""
    ropes = [self._rope_of(c) for c in group]
    ropes += [ropes[0]] * (self.candidates - len(group))  # another shape would compile again
    stacked = _by_row(ropes, self._samples)
    total = np.zeros(len(ropes))
    for i in range(0, len(self._data.tokens), self._samples):
      tokens = self._data.tokens[i : i + self._samples]
      own = len(tokens)
      tokens = np.concatenate([tokens, np.repeat(tokens[:1], self._samples - own, axis=0)])
      losses = self._compiled(self._variables, self._put(np.tile(tokens, (len(ropes), 1))), stacked)
      losses = np.asarray(jax.device_get(losses), np.float64)
      losses = losses.reshape(len(ropes), self._samples, -1)
      for row, first in enumerate(self._data.first[i : i + own]):
        total += losses[:, row, first - 1 :].sum(-1)  # losses[p - 1] is that of token p
    found = total[: len(group)] / self._scored
    return [float(x) if np.isfinite(x) else float("inf") for x in found]

  def gradient(self, base: Rope, candidate, samples: int, step: int) -> list[float]:
    """The gradient of the mean loss with respect to the factors, over some of the rows.

    Args:
      base: the rope whose frequencies the factors divide.
      candidate: where.
      samples: rows; 0: all.
      step: 1, 2, ...; the rows are taken in turn.
    """
    n = len(self._data.tokens)
    samples = min(samples, n) or n
    if self._descend is None:
      self._descend = compiler.jit(jax.grad(self._row_loss))
    inv_freq = jnp.asarray(base.inv_freq, jnp.float32)
    rope = self._rope_of(candidate)
    total = np.zeros(len(candidate.factors))
    for k in range(samples):
      i = ((step - 1) * samples + k) % n
      tokens, first = self._data.tokens[i : i + 1], self._data.first[i]
      weights = (np.arange(tokens.shape[1]) >= first - 1).astype(np.float32)[None]
      weights[:, -1] = 0  # nothing follows the last token
      factors = jnp.asarray(candidate.factors, jnp.float32)
      slope = self._descend(factors, self._variables, self._put(tokens), weights, inv_freq, rope)
      total += np.asarray(jax.device_get(slope), np.float64)
    return [float(x) for x in total / samples]

  def _row_loss(self, factors, variables, tokens, weights, inv_freq, rope):
    rope = rope.with_inv_freq(inv_freq / factors)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = dict(
      tokens=tokens,
      targets=jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))),
      positions=places,
      segment_ids=jnp.zeros_like(tokens),
      weights=weights,
    )
    loss = step_lib.batch_loss(self._model, variables, batch, rope, self._chunk)
    return loss / (self._scored / len(self._data.tokens))  # their mean over rows is the fitness

  def _put(self, tokens: np.ndarray):
    split = sharding.batch_sharding(self._mesh, rows=len(tokens))
    return jax.make_array_from_callback(tokens.shape, split, lambda index: tokens[index])

  def _compile(self, candidates: int):
    length = self._data.tokens.shape[1]
    device = self._mesh.local_devices[0]
    parallel = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    some = candidates
    if candidates * self._samples % parallel:
      raise ValueError(
        f"config.search.batch_size={candidates} times config.search.fitness.batch_size="
        f"{self._samples}: the mesh's data x fsdp = {parallel} must divide it"
      )
    if not candidates:
      some = max(_TOKENS.get(device.platform, 8192) // (length * self._samples), 1) * parallel
    while True:
      ropes = _by_row([self._rope_of(None)] * some, self._samples)
      tokens = self._put(np.zeros((some * self._samples, length), np.int32))
      there, need = _limit(device), math.inf
      try:
        compiled = self._losses.lower(self._variables, tokens, ropes).compile()
        need = _memory(compiled)
      except jax.errors.JaxRuntimeError as error:  # compilers for TPU refuse themselves
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
      if need <= there:
        return some, compiled
      if candidates or some <= parallel:
        raise ValueError(
          f"config.search.batch_size={candidates}: {some} x {self._samples} sequences of {length} "
          f"tokens need {need / 2**30:.1f} GiB on a device with {there / 2**30:.1f}; lower it, or "
          "config.search.fitness.batch_size, or split more by config.mesh"
        )
      some = max(some // 2 // parallel, 1) * parallel


class SubjectFitness:
  """Any evaluation, of one candidate at a time: its value at its one length, or its opposite.

  Args:
    evaluate: (Subject) -> value, lower is better.
    subject_of: (seq_len -> Rope) -> Subject with this rope; called once, so that what it compiles
      serves all candidates.
    rope_of: (Candidate, seq_len) -> host Rope.
  """

  candidates = 1

  def __init__(self, evaluate: Callable, subject_of: Callable, rope_of: Callable):
    self._evaluate, self._candidate = evaluate, None
    self._subject = subject_of(lambda seq_len: rope_of(self._candidate, seq_len))

  def __call__(self, group: list) -> list[float]:
    """The fitness of one candidate."""
    (self._candidate,) = group
    value = float(self._evaluate(self._subject))
    return [value if np.isfinite(value) else float("inf")]


def entry_value(entry, subject: evals.Subject) -> float:
  """The value of an evaluation, or its opposite where more is better: only of 'ppl' is it less."""
  result = evals.evaluate(entry, subject)[str(entry.lengths[0])]
  value = result[result["metric"]]
  return value if result["metric"] == "ppl" else -value


def _by_row(ropes: list[Rope], samples: int) -> Rope:
  """A rope for each row, on a leading axis of all its numbers, `samples` rows for each."""

  def stack(*leaves):
    out = np.repeat(np.stack([np.asarray(x) for x in leaves]), samples, axis=0)
    return out.astype(np.int32) if out.dtype == np.int64 else out

  return jax.tree.map(stack, *ropes)


def _memory(compiled) -> int:
  found = compiled.memory_analysis()
  if found is None:
    return 0
  return found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes


def _limit(device) -> float:
  """Bytes that a program may use on a device."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return 0.95 * stats["bytes_limit"]
  return 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
