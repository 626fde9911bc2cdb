"""Entries of `config.evals`: what can be set of each type of evaluation, and the defaults.

In a config, `c.evals.NAME = config.passkey(lengths=(4096, 8192))` has all the keys of its type, so
that the command line can set each of them; `dict(type="passkey", lengths=(4096, 8192))` is
completed when the config is used.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def perplexity(**options) -> ConfigDict:
  """Perplexity by context length and by position (rope_jax/evals/perplexity.py)."""
  c = _entry("perplexity")
  # Text files or globs, comma-separated, each file a document; 'tfds:NAME/SPLIT', a split of a
  # corpus; or '', the validation split of data.source.
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


def posgen(**options) -> ConfigDict:
  """Accuracy on PosGen within and beyond the trained length (rope_jax/evals/posgen.py)."""
  c = _entry("posgen")
  c.split = "test"  # or 'val'
  c.length = 256  # tokens of a sequence, without the EOS before them
  c.num_samples = 1000  # at most data.posgen.held_out
  c.every_tokens = 32  # tokens of a part in `by_position`
  c.batch_size = 50  # sequences at a time
  return _finished(c, options)


ENTRIES = dict(perplexity=perplexity, posgen=posgen)


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
    if set(given) != set(entry):
      entry.update(given)
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
