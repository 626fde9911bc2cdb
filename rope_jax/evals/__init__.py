"""Evaluations: each is an entry of `config.evals`, run in training and by launch/eval.py alike.

The result of one is {column: {"metric": NAME, NAME: value, ...}}, where a column is mostly a length
in tokens, and besides the value there may be

  "stderr", or "low" and "high" (95%)    how sure it is
  "samples"                              how many it is from
  "threshold"                            the value that counts as holding at this length
  "text"                                 digest of what was read: of another, another value
  "tasks": {task: {as a column}}         of which the value is the mean
  "by_position": [{"start", "end", ...}] the same for parts of the sequence, in tokens
  "show": "by_position"                  that these parts are a table of their own on the screen
  "by_depth": [{"depth", ...}]           the same for places of what is to be found, in [0, 1]

so that tables, figures and pages (`rope_jax.report`, `figures`, `html`) need to know no type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

# type of an entry -> module with
#   validate(name, entry, config): raises ValueError for settings, before anything is read;
#   check(entry, subject): raises ValueError if the data is not there;
#   lengths(entry): tokens of the sequences that it runs at once, which the mesh must divide;
#   evaluate(entry, subject): the result, for JSON.
EVALS = dict(
  perplexity="rope_jax.evals.perplexity",
  passkey="rope_jax.evals.passkey",
  ruler="rope_jax.evals.ruler",
  needle="rope_jax.evals.needle",
  posgen="rope_jax.evals.posgen",
  lm_eval="rope_jax.evals.harness",
)


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is evaluated.

  Attributes:
    config: of the run.
    tokenizer: its tokenizer.
    losses: (tokens [B, L] int32, seq_len) -> losses [B, L - 1] of tokens 1 .. L-1 in nats, under
      the rope of a sequence of seq_len tokens.
    generate: (prompts, max_new_tokens, batch_size=1, what="", until=None, **options) -> the
      continuation of each prompt, greedy unless the options of `Generator` say otherwise; all are
      1-D int32 ids, without the end of text that may have stopped them. `what` is for the progress
      bar; `until` (number of a prompt, its new tokens) says whether they are enough already.
    predictions: (tokens [B, L] int32, seq_len) -> int32 [B, L], the most likely token after each.
  """

  config: Any
  tokenizer: Any
  losses: Callable
  generate: Callable | None = None
  predictions: Callable | None = None

  def prompt(self, text: str):
    """Ids of a text as the start of a sequence: with BOS where the tokenizer itself adds it."""
    ids = self.tokenizer.encode(text)
    bos = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
    return np.concatenate([np.asarray(bos, np.int32), ids])


def module(kind: str) -> ModuleType:
  """The module of a type of evaluation."""
  return importlib.import_module(EVALS[kind])


def evaluate(entry, subject: Subject) -> dict:
  """Runs one entry; its results have nothing that differs between two identical runs."""
  return module(entry.type).evaluate(entry, subject)


def run(name: str, subject: Subject) -> dict:
  """Runs the entry config.evals.NAME; an error names it."""
  with _named(name):
    return evaluate(subject.config.evals[name], subject)


def check(config, tokenizer) -> None:
  """Reads the data of every evaluation of a config: what is missing is found before training.

  Raises:
    ValueError: naming the evaluation.
  """
  for name, entry in config.evals.items():
    with _named(name):
      module(entry.type).check(entry, Subject(config, tokenizer, None))


def lengths(config) -> list[int]:
  """Tokens of all the sequences that the evaluations of a config run at once."""
  return sorted({n for entry in config.evals.values() for n in module(entry.type).lengths(entry)})


@contextlib.contextmanager
def _named(name: str):
  try:
    yield
  except ValueError as error:
    named = "config." in str(error)
    raise ValueError(str(error) if named else f"config.evals.{name}: {error}") from error
