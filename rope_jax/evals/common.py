"""What evaluations share: checks, the text that they read, intervals."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator

from rope_jax import config as config_lib
from rope_jax.errors import check


def check_lengths(name: str, entry, c) -> None:
  """Raises ValueError unless the lengths of an entry are token counts that the rope is made for."""
  key, n = f"{name}.lengths", entry.lengths
  check(n and all(isinstance(x, int) and x > 1 for x in n), key, n,
        "token counts above 1, e.g. 8192,16384")  # fmt: skip
  check(max(n) <= c.rope.context, key, n,
        f"at most rope.context={c.rope.context}; raise it and fix rope.factor to go beyond what "
        "the method was built for")  # fmt: skip


def check_positive(name: str, entry, keys: str) -> None:
  """Raises ValueError unless these (space-separated) keys of an entry are at least 1."""
  for key in keys.split():
    check(entry[key] >= 1, f"{name}.{key}", entry[key], "at least 1")


def texts(files: str, c) -> Iterator[str]:
  """Documents, in order.

  Args:
    files: text files or globs, comma-separated, each file a document; 'tfds:NAME/SPLIT'; or '',
      the validation split of config.data.source.
    c: config of the run.
  """
  from rope_jax.data import corpus
  from rope_jax.data.text_builder import read_text

  directory = config_lib.data_dir(c)
  if not files:
    documents = corpus.documents(c.data.source, "validation", directory, c.data.text_key)
  elif files.startswith("tfds:"):
    name, _, split = files.rpartition("/")
    documents = corpus.documents(name, split, directory)
  else:
    patterns = [p.strip() for p in files.split(",")]
    yield from (read_text(p) for x in patterns for p in sorted(glob.glob(x, recursive=True)))
    return
  yield from (documents[i] for i in range(len(documents)))


def interval(successes: float, trials: int) -> tuple[float, float]:
  """Wilson's 95% interval of a share, which stays within [0, 1] and is honest for few trials."""
  z, n = 1.959964, trials
  p = successes / n
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return max(centre - half, 0.0), min(centre + half, 1.0)
