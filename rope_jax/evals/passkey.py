"""Passkey retrieval: a number hidden in filler, in two published forms.

'yarn'  YaRN and LongRoPE (jquesnelle/yarn, eval/passkey.py): the filler is counted in characters
        and cut within words. Where these scripts come near a length (3.65 characters a token, or
        steps of 25 characters), here the filler is the longest with which the prompt and
        max_new_tokens fit in it, for each sample: one more character does not.
'pose'  PoSE (dwzhu-pku/PoSE, src/eval_passkey.py): whole repetitions of the filler, of 25 tokens
        each as Llama counts, (T - 32 - 26 - 11) // 25 of them; as there, T is the length, less
        100 where that is the whole context. The prompt is then only near the length.

Papers speak of five digits; both scripts draw the key from 1 .. 50,000, and so is it here.
"""

from __future__ import annotations

import re

import numpy as np

from rope_jax.errors import check as expect
from rope_jax.errors import choice
from rope_jax.evals.common import check_lengths, check_positive, interval
from rope_jax.evals.prompts import check_template, longest, wrap

RULES = ("yarn", "pose")
THRESHOLD = 0.8  # YaRN's Table 5: the passkey context is the longest with at least this accuracy
MAX_KEY = 50_000

# From https://github.com/epfml/landmark-attention, from which both scripts have it.
TASK = (
  "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
  "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"


def evaluate(entry, subject) -> dict:
  """Accuracy for each of entry.lengths; the keys of `config.passkey` say what can be set.

  Returns:
    {"8192": {"metric": "accuracy", "accuracy", "low", "high", "samples", "threshold",
    "by_depth": [{"depth", "accuracy", "low", "high", "samples"}, ...]}, ...}; `by_depth`, with
    the share of the filler that precedes the key, only where entry.depths is set.

  Raises:
    ValueError: if a length is too short, or too short for the filler of rule 'pose'.
  """
  return {str(n): _at_length(entry, subject, n) for n in entry.lengths}


def validate(name: str, e, c) -> None:
  """Raises ValueError, naming the key, for settings that do not fit."""
  choice(f"{name}.rule", e.rule, RULES)
  check_positive(name, e, "num_samples max_new_tokens batch_size")
  expect(e.depths == 0 or e.depths >= 2, f"{name}.depths", e.depths, "0 (random) or at least 2")
  expect(e.seed >= 0, f"{name}.seed", e.seed, "0 or more")
  check_template(f"{name}.template", e.template)
  check_lengths(name, e, c)


def check(entry, subject) -> None:
  """Raises ValueError for a length that no prompt fits in."""
  keys = {key for _, key, _ in draws(entry)}
  for n in entry.lengths:
    for key in keys:
      if entry.rule == "pose":
        _pose(entry, subject, n, key, lambda filler: filler // 2)
      else:
        _check_fits(entry, n, _ids(entry, subject, key, 0, 0), n)


def lengths(entry) -> tuple[int, ...]:
  """None: prompts go through the model in chunks."""
  return ()


def prompt(rule: str, key: int, before: int, after: int) -> str:
  """The prompt with that much filler before and after the line with the key.

  Filler is in characters ('yarn') or in repetitions, which no space divides ('pose').
  """

  def filler(n: int) -> str:
    return FILLER * n if rule == "pose" else ((FILLER + " ") * (n // len(FILLER) + 1))[:n]

  line = f"The pass key is {key}. Remember it. {key} is the pass key."
  return "\n".join([TASK, filler(before), line, filler(after), QUESTION])


def prompts(entry, subject, length: int) -> list[tuple[float | None, int, np.ndarray]]:
  """(depth, key, ids) of the samples at a length; depth is None where it is random."""
  out, filler = [], 0
  for depth, key, share in draws(entry):

    def before(filler: int, depth=depth, share=share) -> int:
      return int(share * (filler + 1)) if depth is None else round(depth * filler)

    if entry.rule == "pose":
      ids = _pose(entry, subject, length, key, before)
    else:
      filler, ids = _longest(entry, subject, length, key, before, filler)
    out.append((depth, key, ids))
  return out


def draws(entry) -> list[tuple[float | None, int, float]]:
  """(depth, key, share of the filler before it where depth is None) of the samples at a length."""
  rng = np.random.default_rng(entry.seed)
  depths = np.linspace(0, 1, entry.depths).tolist() if entry.depths else [None]
  return [
    (depth, int(rng.integers(1, MAX_KEY, endpoint=True)), rng.random())
    for depth in depths
    for _ in range(entry.num_samples)
  ]


def answer(text: str) -> int | None:
  """The first integer of a continuation."""
  found = re.search(r"\d+", text, re.ASCII)
  return int(found.group()) if found else None


def _at_length(entry, subject, length: int) -> dict:
  samples = prompts(entry, subject, length)
  continuations = subject.generate(
    [ids for _, _, ids in samples],
    entry.max_new_tokens,
    batch_size=entry.batch_size,
    what=f"passkey {length}",
  )
  right = [
    (depth, answer(subject.tokenizer.decode(ids)) == key)
    for (depth, key, _), ids in zip(samples, continuations, strict=True)
  ]
  result = dict(metric="accuracy", **_summary([r for _, r in right]), threshold=THRESHOLD)
  if entry.depths:
    depths = dict.fromkeys(depth for depth, _ in right)
    result["by_depth"] = [
      dict(depth=d, **_summary([r for depth, r in right if depth == d])) for d in depths
    ]
  return result


def _summary(right: list[bool]) -> dict:
  low, high = interval(sum(right), len(right))
  return dict(accuracy=sum(right) / len(right), low=low, high=high, samples=len(right))


def _ids(entry, subject, key: int, before: int, after: int) -> np.ndarray:
  return subject.prompt(wrap(entry.template, prompt(entry.rule, key, before, after)))


def _longest(entry, subject, length: int, key: int, before, guess: int) -> tuple[int, np.ndarray]:
  def ids(filler: int) -> np.ndarray:
    return _ids(entry, subject, key, before(filler), filler - before(filler))

  found = longest(ids, length - entry.max_new_tokens, guess=guess)
  if not found:
    _check_fits(entry, length, ids(0), length)
  return found


def _pose(entry, subject, length: int, key: int, before) -> np.ndarray:
  context = subject.config.rope.context
  counted = length - 100 if length == context else length
  filler = (counted - 32 - 26 - 11) // 25
  if filler < 0:
    raise ValueError(f"lengths={length}: expected at least 69 tokens (169 if it is the context)")
  ids = _ids(entry, subject, key, before(filler), filler - before(filler))
  if len(ids) > length:
    raise ValueError(
      f"rule='pose': its filler is counted in tokens of Llama; here the prompt of length {length} "
      f"has {len(ids)} tokens; expected rule 'yarn', which measures them"
    )
  # PoSE does not count the answer; beyond the context there is nothing to generate in.
  _check_fits(entry, length, ids, context)
  return ids


def _check_fits(entry, length: int, ids: np.ndarray, limit: int) -> None:
  needed = len(ids) + entry.max_new_tokens
  if needed > limit:
    raise ValueError(
      f"lengths={length}: expected more: the prompt and max_new_tokens are {needed} tokens"
    )
