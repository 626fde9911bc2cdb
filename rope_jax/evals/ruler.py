"""RULER: eleven synthetic tasks by length, and their mean (`rope_jax.evals.ruler_tasks`).

A length holds the prompt and the budget of new tokens. RULER grows the haystack in steps (500
words, 25 lines) and shrinks it where a sample is too long; here each sample has the largest
haystack with which it fits: with one unit more it does not.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from rope_jax.errors import check as expect
from rope_jax.errors import choice
from rope_jax.evals import ruler_text
from rope_jax.evals.common import check_files, check_lengths, check_positive, interval
from rope_jax.evals.prompts import check_template, longest, wrap
from rope_jax.evals.ruler_tasks import TASKS

THRESHOLD = 0.856  # Llama-2-7B at 4k, RULER's measure of an effective length


class Sample(NamedTuple):
  """A prompt (1-D int32), what its continuation should contain, and its units of haystack."""

  ids: np.ndarray
  references: list[str]
  size: int


def evaluate(entry, subject) -> dict:
  """Scores for each of entry.lengths; the keys of `config.ruler` say what can be set.

  Returns:
    {"8192": {"metric": "score", "score", "samples", "threshold", "haystack", "words",
    "tasks": {task: {"metric": "score", "score", "low", "high", "samples"}}}, ...}. Scores are
    mean shares of references found. `low` and `high` take a share as that much of a success; the
    mean over tasks has none, since tasks are not a sample of anything. `haystack` and `words` say
    what the samples were made of.

  Raises:
    ValueError: if a length is too short for a task, or there is no text, or too few words.
  """
  material = ruler_text.load(entry, subject.config)
  return {str(n): _at_length(entry, subject, material, n) for n in entry.lengths}


def validate(name: str, e, c) -> None:
  """Raises ValueError, naming the key, for settings that do not fit."""
  check_positive(name, e, "num_samples batch_size")
  expect(e.seed >= 0, f"{name}.seed", e.seed, "0 or more")
  expect(e.tasks and len(set(e.tasks)) == len(e.tasks), f"{name}.tasks", e.tasks,
         "at least one task, each once")  # fmt: skip
  for task in e.tasks:
    choice(f"{name}.tasks", task, TASKS)
  check_files(f"{name}.haystack", e.haystack)
  check_template(f"{name}.template", e.template)
  check_lengths(name, e, c)


def check(entry, subject) -> None:
  """Raises ValueError for missing files, too few words, and lengths too short for a task."""
  material = ruler_text.load(entry, subject.config)
  for length in entry.lengths:
    for name in entry.tasks:
      task = TASKS[name]
      smallest = [prompt(entry, subject, material, name, length, i, task.smallest)[0]
                  for i in range(entry.num_samples)]  # fmt: skip
      longest_of = max(map(len, smallest))
      if longest_of + task.new_tokens > length:
        raise _too_short(name, length, longest_of)


def lengths(entry) -> tuple[int, ...]:
  """None: prompts go through the model in chunks."""
  return ()


def prompt(
  entry, subject, material, name: str, length: int, i: int, size: int
) -> tuple[np.ndarray, list[str]]:
  """Ids and references of sample i of a task, with that much haystack."""
  rng = np.random.default_rng([entry.seed, i, *name.encode()])
  example = TASKS[name].make(rng, size, length, material)
  text = f"{wrap(entry.template, example.text)} {example.prefix}"
  return subject.prompt(text), example.references


def samples(entry, subject, material, name: str, length: int) -> list[Sample]:
  """The samples of a task at a length; the same seed draws the same, whatever the other tasks."""
  task, size, out = TASKS[name], 0, []
  bar = f"ruler {name} {length}: samples"
  for i in tqdm(range(entry.num_samples), desc=bar, disable=None, leave=False):
    made = partial(prompt, entry, subject, material, name, length, i)
    found = longest(lambda n, made=made: made(n)[0], length - task.new_tokens, task.smallest, size)
    if not found:
      raise _too_short(name, length, len(made(task.smallest)[0]))
    size, ids = found
    out.append(Sample(ids, made(size)[1], size))
  return out


def score(continuation: str, references: list[str]) -> float:
  """The share of references in a continuation, in any case: RULER's string_match_all."""
  return sum(r.lower() in continuation.lower() for r in references) / len(references)


def _at_length(entry, subject, material, length: int) -> dict:
  tasks, made_up = {}, 0
  for name in entry.tasks:
    drawn = samples(entry, subject, material, name, length)
    if name == "cwe":
      made_up = max(0, max(s.size for s in drawn) - len(material.words))

    def enough(i: int, new, drawn=drawn) -> bool:  # once all is found nothing can change the score
      return score(subject.tokenizer.decode(new), drawn[i].references) == 1

    continuations = subject.generate(
      [s.ids for s in drawn],
      TASKS[name].new_tokens,
      batch_size=entry.batch_size,
      what=f"ruler {name} {length}",
      until=enough,
    )
    scores = [
      score(subject.tokenizer.decode(ids), s.references)
      for ids, s in zip(continuations, drawn, strict=True)
    ]
    low, high = interval(sum(scores), len(scores))
    mean = sum(scores) / len(scores)
    tasks[name] = dict(metric="score", score=mean, low=low, high=high, samples=len(scores))
  return dict(
    metric="score",
    score=sum(t["score"] for t in tasks.values()) / len(tasks),
    samples=sum(t["samples"] for t in tasks.values()),
    threshold=THRESHOLD,
    tasks=tasks,
    haystack=material.haystack_name,
    words=material.words_name + (f", and {made_up} made up for cwe" if made_up else ""),
  )


def _too_short(name: str, length: int, tokens: int) -> ValueError:
  needed = tokens + TASKS[name].new_tokens
  return ValueError(f"lengths={length}: expected at least {needed} tokens for task {name!r}")
