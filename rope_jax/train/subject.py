"""What evaluations see of a model in training, or of a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from rope_jax import evals, resolve
from rope_jax.model.generate import Generator
from rope_jax.model.llama import Llama
from rope_jax.train import sharding
from rope_jax.train import step as step_lib
from rope_jax.train.answers import Answers


def make(
  c, mesh, model: Llama, text, rope_of: Callable | None = None
) -> Callable[[dict], evals.Subject]:
  """The function variables -> Subject; what it compiles is kept for the next variables.

  With `Answers` as its second argument, what they hold is not computed again.

  Args:
    c: a config.
    mesh: that is set.
    model: its model.
    text: its tokenizer.
    rope_of: seq_len -> Rope; that of the config if None.
  """
  if rope_of is None:
    rope_of = functools.cache(lambda seq_len: resolve.rope(c, seq_len))  # dprope takes its time
  chunk = c.train.loss_chunk
  loss, prediction = (
    make(model, chunk=chunk) for make in (step_lib.token_loss, step_lib.token_predictions)
  )
  generator = Generator(
    model,
    None,
    rope_of,
    depends_on_length=resolve.depends_on_length(c),
    on_change=c.generate.on_change,
    chunk=c.generate.chunk,
    vocab_size=text.vocab_size,
  )

  def subject(variables, answers: Answers | None = None) -> evals.Subject:
    def ask(question, answer):
      return answers.ask(question, answer) if answers else answer()

    def whole(name, function, tokens, seq_len):
      def run():
        split = sharding.batch_sharding(mesh, rows=len(tokens))
        batch = jax.make_array_from_callback(tokens.shape, split, lambda index: tokens[index])
        return jax.device_get(function(variables, batch, rope_of(seq_len)))

      return ask([name, tokens, seq_len], run)

    def generate(prompts, max_new_tokens, *, batch_size=1, what="", until=None, **options):
      longest = max(map(len, prompts), default=0) + max_new_tokens
      if longest > c.rope.context:
        raise ValueError(
          f"config.rope.context={c.rope.context}: a prompt with {max_new_tokens} new tokens is "
          f"{longest} tokens long"
        )
      generator.variables = variables

      def group(rows, **settings):
        """Of the rows of a batch, each after the number of its tokens."""
        found = generator(rows, max_new_tokens, stop=stop, **settings, **options)
        return np.stack([np.pad([len(x), *x], (0, max_new_tokens - len(x))) for x in found])

      def kept(rows, **settings):
        question = ["generate", *rows, max_new_tokens, stop, sorted(options.items())]
        found = ask(question, lambda: group(rows, **settings))
        return [row[1 : 1 + row[0]] for row in found]

      return _in_batches(kept, prompts, batch_size, what, until)

    return evals.Subject(
      c,
      text,
      losses=functools.partial(whole, "losses", loss),
      generate=generate,
      predictions=functools.partial(whole, "predictions", prediction),
    )

  stop = [] if text.eos_id is None else [text.eos_id]
  return subject


def _in_batches(generate: Callable, prompts, batch_size: int, what: str, enough) -> list:
  """Generates for prompts of like lengths together, the longest first: they need most memory."""
  order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
  out: list = [None] * len(prompts)
  with tqdm(total=len(prompts), desc=what, disable=None if what else True, leave=False,
            bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]") as bar:  # fmt: skip
    for first in range(0, len(order), batch_size):
      group = order[first : first + batch_size]

      def progress(share, first=first, group=group):
        bar.n = first + share * len(group)
        bar.refresh()

      def until(row, new, group=group):  # those that only fill up are not waited for
        return row >= len(group) or bool(enough and enough(group[row], new))

      # A last, smaller group is filled up: another shape would compile again.
      rows = [prompts[i] for i in group] + [prompts[group[0]]] * (batch_size - len(group))
      found = generate(rows, until=until, progress=progress)
      for i, new in zip(group, found):
        out[i] = np.asarray(new, np.int32)
      progress(1.0)
  return out
