"""Entries of `config.evals`: what can be set of each type of evaluation, and the defaults.

In a config, `c.evals.NAME = config.passkey(lengths=(4096, 8192))` has all the keys of its type, so
that the command line can set each of them; `dict(type="passkey", lengths=(4096, 8192))` is
completed when the config is used.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from rope_jax.evals.ruler_tasks import TASKS


def perplexity(**options) -> ConfigDict:
  """Perplexity by context length and by position (rope_jax/evals/perplexity.py)."""
  c = _entry("perplexity")
  # Text files or globs, comma-separated, each file a document; 'tfds:NAME/SPLIT', a split of a
  # corpus; 'split:train', a split of data.source; or '', its validation split.
  c.files = ""
  c.start = 0  # character of each document to start at
  c.lengths = (4096,)
  c.protocol = "sliding"  # 'sliding', 'sliding_all' or 'truncate'
  c.stride = 256  # of the sliding protocols
  c.num_samples = 1
  c.document_tokens = 0  # tokens of a sample that windows slide over; 0: the longest length
  c.buckets = 8  # equal parts of the window in `by_position`
  c.batch_size = 1  # windows at a time
  return _finished(c, options)


def passkey(**options) -> ConfigDict:
  """Retrieval of a number hidden in filler (rope_jax/evals/passkey.py)."""
  c = _entry("passkey")
  c.lengths = (4096,)  # tokens of the prompt and of what is generated
  c.rule = "yarn"  # or 'pose': how the filler is counted
  c.depths = 0  # evenly spaced places of the key; 0: uniformly random ones, as in the papers
  c.num_samples = 10  # for each length, and each depth
  c.max_new_tokens = 10
  c.template = "{prompt}"  # what a chat model wants around the prompt
  c.seed = 42  # set anew for each length
  c.batch_size = 1  # prompts at a time
  return _finished(c, options)


def ruler(**options) -> ConfigDict:
  """RULER's tasks but for its question answering (rope_jax/evals/ruler.py)."""
  c = _entry("ruler")
  c.lengths = (4096,)  # tokens of the prompt and of what is generated
  c.tasks = tuple(TASKS)
  c.num_samples = 50  # for each length and task; RULER has 500
  # The text that needles are hidden in: as perplexity.files, or '', prose of Python's own manual.
  c.haystack = ""
  c.words = ""  # a file with a word on each line, or '', the words of that prose
  c.template = "{prompt}"  # what a chat model wants around the prompt; the answer begins after it
  c.seed = 42  # set anew for each length and task
  c.batch_size = 1  # prompts at a time
  return _finished(c, options)


def needle(**options) -> ConfigDict:
  """Perplexity of the answer about a needle in text (rope_jax/evals/needle.py)."""
  c = _entry("needle")
  c.files = ""  # as perplexity.files
  c.start = 0  # character of each document to start at
  c.lengths = (4096,)  # tokens of the sequence, with the answer
  c.placement = "start"  # of the needle; or 'spread' over the text
  c.num_samples = 10
  c.seed = 42  # set anew for each length
  c.batch_size = 1  # sequences at a time
  return _finished(c, options)


def posgen(**options) -> ConfigDict:
  """Accuracy on PosGen within and beyond the trained length (rope_jax/evals/posgen.py)."""
  c = _entry("posgen")
  c.split = "test"  # or 'val'
  c.length = 256  # tokens of a sequence, without the EOS before them
  c.num_samples = 1000  # at most data.posgen.held_out
  c.every_tokens = 32  # tokens of a part in `by_position`
  c.batch_size = 50  # sequences at a time
  return _finished(c, options)


def lm_eval(**options) -> ConfigDict:
  """Tasks of the lm-evaluation-harness, an extra (rope_jax/evals/harness.py)."""
  c = _entry("lm_eval")
  c.tasks = ()  # names of tasks and groups, or paths of their .yaml files
  c.include_path = ""  # a directory with .yaml files of tasks, which may then be named
  c.num_fewshot = -1  # examples in a prompt; -1: as each task says
  c.limit = 0  # the first so many documents of each task; 0: all
  c.metric = ""  # of all tasks; '': acc_norm, else acc, else the first of each
  c.max_length = 0  # tokens; 0: rope.context. What is longer loses its start
  c.template = "{prompt}"  # what a chat model wants around the prompt; the answer begins after it
  # For tasks that make their data, an object in JSON; of RULER {"max_seq_lengths": [8192],
  # "tokenizer": DIR}, with metric '8192'.
  c.metadata = ""
  c.seed = 42  # of examples, of tasks that shuffle, and of samples
  c.batch_size = 1  # sequences at a time
  return _finished(c, options)


ENTRIES = dict(
  perplexity=perplexity,
  passkey=passkey,
  ruler=ruler,
  needle=needle,
  posgen=posgen,
  lm_eval=lm_eval,
)


def complete(evals: ConfigDict) -> None:
  """Fills in the defaults of entries that were given as a plain dict.

  Raises:
    ValueError: for a type or a key that there is not.
  """
  for name, given in evals.items():
    known = ", ".join(map(repr, ENTRIES))
    if given.get("type") not in ENTRIES:
      raise ValueError(f"config.evals.{name}.type={given.get('type')!r}: expected one of {known}")
    entry = ENTRIES[given.type]()
    unknown = sorted(set(given) - set(entry))
    if unknown:
      raise ValueError(
        f"config.evals.{name}.{unknown[0]}: unknown to type {given.type!r}; known: "
        + ", ".join(sorted(entry))
      )
    try:
      entry.update(given)
    except TypeError as error:
      raise ValueError(f"config.evals.{name}: {error}") from error
    if given != entry:
      evals[name] = entry


def _entry(kind: str) -> ConfigDict:
  c = ConfigDict()
  c.type = kind
  c.every_steps = 0  # training steps between evaluations; 0: only at the end
  return c


def _finished(c: ConfigDict, options: dict) -> ConfigDict:
  c.lock()
  c.update(options)
  return c
