"""A `Subject` as a model of lm_eval, registered there as "rope_jax" when this is imported.

Tokens, windows and truncation are those of lm_eval's Hugging Face backend (lm_eval 0.4.13,
lm_eval/models/huggingface.py), so that scores are comparable: at most max_length tokens go into
the model, what is longer loses its start, an empty context is BOS (EOS without one), and BOS
precedes a text where the tokenizer itself puts it there. So a rolling log-likelihood of a tokenizer
that adds BOS scores that BOS, too, as there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from rope_jax import resolve
from rope_jax.evals.harness_generation import Generation, generation
from rope_jax.evals.prompts import PLACE, wrap
from rope_jax.model import attention, context

UNIT = 128  # tokens of the shortest batches; splash attention takes multiples of it


@register_model("rope_jax")
class RopeJaxLM(TemplateLM):
  """The model of a subject.

  Scores need two passes, of losses and of most likely tokens; rolling ones only the first.

  Where the rope depends on the length of a sequence, only sequences of one exact length are scored
  together, each under the rope of its tokens and not of the padding; short batches are filled up,
  so that a large batch_size is then mostly wasted.

  Args:
    subject: what is evaluated.
    batch_size: sequences at a time.
    max_length: tokens of a sequence; rope.context if 0.
    template: what a chat model wants around the prompt.
    seed: of samples, for tasks that ask for do_sample.

  Attributes:
    truncated: how many requests lost the start of their context, by task.
  """

  def __init__(self, subject, *, batch_size: int = 1, max_length: int = 0, template: str = PLACE,
               seed: int = 0):  # fmt: skip
    super().__init__()
    self.subject, self.batch_size = subject, batch_size
    self.max_length = max_length or subject.config.rope.context
    self.template, self.seed = template, seed
    self.by_length = resolve.depends_on_length(subject.config)
    self.truncated: Counter[str] = Counter()

  # ---- Tokens.

  @property
  def eot_token_id(self):
    return self.subject.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What precedes a text that has no context.

    Raises:
      ValueError: if the tokenizer has neither BOS nor EOS.
    """
    tokenizer = self.subject.tokenizer
    found = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if found is None:
      raise ValueError(
        "the tokenizer has neither BOS nor EOS, which a text without context is scored after"
      )
    return found

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """Ids; with BOS where the tokenizer itself adds it, unless the text begins with it."""
    tokenizer = self.subject.tokenizer
    ids = tokenizer.encode(string).tolist()
    there = add_special_tokens is None and ids[:1] == [tokenizer.bos_id]
    adds = tokenizer.adds_bos and add_special_tokens is not False and not there
    return [tokenizer.bos_id] * adds + ids

  @property
  def tokenizer_name(self) -> str:
    return self.subject.tokenizer.fingerprint

  def apply_chat_template(self, chat_history: list[dict], add_generation_prompt=True) -> str:
    """The prompt of a task within the template.

    lm_eval gives the task's description, one turn of the user, which has all examples, and what
    the answer begins with. A template has a place for a prompt alone, so the description precedes
    it there; the answer begins after the template.
    """
    answers = not add_generation_prompt
    asked = chat_history[:-1] if answers else chat_history
    prompt = "\n\n".join(message["content"] for message in asked)
    return wrap(self.template, prompt) + (chat_history[-1]["content"] if answers else "")

  # ---- What lm_eval asks for.

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether greedy decoding gives it) of continuations.

    Args:
      requests: with args (context, continuation).
      disable_tqdm: no progress bar.

    Raises:
      ValueError: for a continuation without tokens, or of more than max_length.
    """
    pairs = [self._pair(*request.args) for request in requests]
    for request, (before, after) in zip(requests, pairs):
      self.truncated[request.task_name] += len(before) + len(after) > self.max_length + 1
    rows = [(request.args, *pair) for request, pair in zip(requests, pairs)]
    return self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Log-probabilities of whole texts in nats, each token scored once, in disjoint windows.

    A last, shorter window is filled up with the tokens before it.

    Args:
      requests: with args (text,).
      disable_tqdm: no progress bar.
    """
    rows, owners = [], []
    for i, request in enumerate(requests):
      ids = self.tok_encode(*request.args)
      for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
        rows.append((None, *make_disjoint_window(window)))
        owners.append(i)
    found = self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm, greedy=False)
    totals = [0.0] * len(requests)
    for i, (score, _) in zip(owners, found):
      totals[i] += score
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Continuations, up to the first of the texts that end them.

    Args:
      requests: with args (context, generation_kwargs).
      disable_tqdm: no progress bar.

    Raises:
      ValueError: for generation_kwargs that are not supported, or an empty context.
    """
    groups: dict[Generation, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(generation(request.args[1], self.max_length), []).append(i)
    out = [""] * len(requests)
    what = "" if disable_tqdm else "lm_eval: generation"
    for how, indices in groups.items():
      prompts = []
      for request in (requests[i] for i in indices):
        ids, room = self.tok_encode(request.args[0]), self.max_length - how.max_new_tokens
        self.truncated[request.task_name] += len(ids) > room
        prompts.append(np.asarray(ids[-room:], np.int32))
      for i, ids in zip(indices, self._generate(prompts, how, what)):
        out[i] = how.cut(self.subject.tokenizer.decode(ids))
    return out

  # ---- On the device.

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, greedy: bool = True):
    """(log-probability, greedy) of (strings, context ids, continuation ids), in their order.

    `greedy` says whether the second is wanted; it is False if not.
    """
    rows = [np.asarray((a + b)[-(self.max_length + 1) :], np.int32) for _, a, b in requests]
    new = [len(after) for _, _, after in requests]
    for strings, before, after in requests:
      if not before or not 0 < len(after) <= self.max_length:
        raise ValueError(
          f"a request has {len(before)} tokens of context and {len(after)} to score, expected at "
          f"least one and 1 to max_length={self.max_length}: {str(strings)[:200]}"
        )
    found: list = [None] * len(rows)
    with tqdm(total=len(rows), desc="lm_eval: scores", leave=False,
              disable=True if disable_tqdm else None) as bar:  # fmt: skip
      for group in self._batches([len(row) for row in rows]):
        longest = len(rows[group[0]])
        tokens = np.zeros((self.batch_size, self._width(longest)), np.int32)
        # A last, smaller group is filled up: another shape would compile again.
        for place in range(self.batch_size):
          row = rows[group[place] if place < len(group) else group[0]]
          tokens[place, : len(row)] = row  # padding comes after all that is read
        # The last token is only scored, so that it is no part of the sequence.
        seq_len = longest - 1 if self.by_length else self.max_length
        losses = np.asarray(self.subject.losses(tokens, seq_len), np.float64)
        likely = np.asarray(self.subject.predictions(tokens, seq_len)) if greedy else None
        for place, i in enumerate(group):
          end = len(rows[i])
          scored = slice(end - new[i] - 1, end - 1)  # place p is for token p + 1
          same = greedy and bool((likely[place, scored] == rows[i][-new[i] :]).all())
          found[i] = -float(losses[place, scored].sum()), same
        bar.update(len(group))
    return found

  def _generate(self, prompts: list[np.ndarray], how: Generation, what: str) -> list[np.ndarray]:
    """New tokens of each prompt."""
    decode, size = self.subject.tokenizer.decode, self.batch_size
    options = dict(
      batch_size=size,
      what=what,
      until=(lambda _, ids: how.enough(decode(ids))) if how.until else None,
      temperature=how.temperature,
      top_p=how.top_p,
    )
    if not how.temperature:
      return self.subject.generate(prompts, how.max_new_tokens, **options)
    # A seed for each batch: lm_eval repeats a request to have several samples of it.
    out: list = [None] * len(prompts)
    for n, group in enumerate(_chunks(_longest_first([len(p) for p in prompts]), size)):
      seed = int(np.random.SeedSequence([self.seed, n]).generate_state(1)[0])
      batch = [prompts[i] for i in group]
      found = self.subject.generate(batch, how.max_new_tokens, seed=seed, **options)
      for i, new in zip(group, found):
        out[i] = new
    return out

  def _pair(self, before: str, after: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation, tokenised together."""
    if before:
      return self._encode_pair(before, after)
    ids, prefix = self.tok_encode(after, add_special_tokens=False), self.prefix_token_id
    return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)

  def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
    """Indices of what is scored together, the longest first: they need most memory."""
    order = _longest_first(lengths)
    key = lengths.__getitem__ if self.by_length else lambda i: 0
    for _, same in itertools.groupby(order, key):
      yield from _chunks(list(same), self.batch_size)

  def _width(self, tokens: int) -> int:
    """Tokens that so many are padded to: few sizes, since each is compiled.

    Two in an octave; but full windows, which are one more than a power of two as a rule, would be
    half as long again, and have steps of an eighth.
    """
    shards = attention.mesh_shape().get(context.AXIS, 1)
    unit = UNIT * (2 * shards if shards > 1 else 1)  # two chunks a device, where balanced

    def up(n: int, steps: int) -> int:
      step = max(unit, (1 << (n - 1).bit_length()) // steps)
      return -(-n // step) * step

    return -(-min(up(tokens, 4), up(self.max_length + 1, 16)) // unit) * unit


def _longest_first(lengths: list[int]) -> list[int]:
  return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
  for i in range(0, len(items), size):
    yield items[i : i + size]
