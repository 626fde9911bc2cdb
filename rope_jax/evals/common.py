"""What evaluations share: checks, the text that they read, intervals."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from rope_jax import config as config_lib
from rope_jax import paths
from rope_jax.errors import MOST, check


def check_lengths(name: str, entry, c) -> None:
  """Raises ValueError unless the lengths of an entry are token counts that the rope is made for."""
  key, n = f"{name}.lengths", entry.lengths
  check(n and all(isinstance(x, int) and x > 1 for x in n), key, n,
        "token counts above 1, e.g. 8192,16384")  # fmt: skip
  check(max(n) <= c.rope.context, key, n,
        f"at most rope.context={c.rope.context}; raise it and fix rope.factor to go beyond what "
        "the method was built for")  # fmt: skip
  check(entry.batch_size * max(n) <= MOST, f"{name}.batch_size", entry.batch_size,
        f"at most {MOST:,} tokens at a time, with {max(n):,} in a sequence")  # fmt: skip


def check_positive(name: str, entry, keys: str) -> None:
  """Raises ValueError unless these (space-separated) keys of an entry are at least 1."""
  for key in keys.split():
    check(entry[key] >= 1, f"{name}.{key}", entry[key], "at least 1")


def check_files(key: str, files: str) -> None:
  """Raises ValueError for a corpus of the catalogue without its split."""
  check("/" in files or not files.startswith("tfds:"), key, files, "'tfds:NAME/SPLIT'")


def text_files(files: str, key: str) -> list[str]:
  """The files of a comma-separated list of paths and globs, in its order.

  Raises:
    ValueError: for a path or glob that names no regular file, with the key.
  """
  found = []
  for pattern in [files] if os.path.lexists(files) else map(str.strip, files.split(",")):
    new = paths.files(pattern)
    if not new:
      raise ValueError(f"{key}={pattern!r}: expected an existing file or a glob that matches")
    found += new
  return found


def texts(files: str, c, key: str = "files") -> Iterator[str]:
  """Documents, in order.

  Args:
    files: text files or globs, comma-separated, each file a document; 'tfds:NAME/SPLIT'; or
      'split:NAME', of config.data.source, '' being its validation split.
    c: config of the run.
    key: what errors call the files.

  Raises:
    ValueError: if a file is not there or cannot be read.
  """
  from rope_jax.data import corpus
  from rope_jax.data.text_builder import Unreadable, read_text

  directory = config_lib.data_dir(c)
  if not files or files.startswith("split:"):
    split = files.removeprefix("split:") or "validation"
    documents = corpus.documents(c.data.source, split, directory, c.data.text_key)
  elif files.startswith("tfds:"):
    name, _, split = files.rpartition("/")
    documents = corpus.documents(name, split, directory, key=key)
  else:
    for path in text_files(files, key):
      try:
        yield read_text(path)
      except Unreadable as error:
        raise ValueError(f"{key}={files!r}: {error}") from None
    return
  yield from (documents[i] for i in range(len(documents)))


def pieces(entry, tokens: int, subject) -> list[np.ndarray]:
  """The first pieces of all documents, then their second pieces, and so on, up to num_samples.

  Args:
    entry: with files, start and num_samples.
    tokens: of each piece.
    subject: whose tokenizer and config are used.

  Raises:
    ValueError: if there are too few.
  """
  later: list[list[np.ndarray]] = []
  found: list[np.ndarray] = []
  for text in texts(entry.files, subject.config):
    ids = subject.tokenizer.encode(text[entry.start :])
    parts = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    found += parts[:1]
    later.append(parts[1:])
    if len(found) == entry.num_samples:
      return found
  for round_ in range(max((len(p) for p in later), default=0)):
    found += [parts[round_] for parts in later if round_ < len(parts)]
  if len(found) < entry.num_samples:
    split, source = entry.files.removeprefix("split:"), subject.config.data.source
    named = split and split == entry.files
    raise ValueError(
      f"num_samples={entry.num_samples} pieces of {tokens} tokens were asked for, "
      + (split if named else f"the {split or 'validation'} split of {source}")
      + f" has {len(found)}"
    )
  return found[: entry.num_samples]


def interval(successes: float, trials: int) -> tuple[float, float]:
  """Wilson's 95% interval of a share, which stays within [0, 1] and is honest for few trials."""
  z, n = 1.959964, trials
  p = successes / n
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  # Bounded by p too, which rounding may pass at 0 and 1: error bars must not be negative.
  return max(min(centre - half, p), 0.0), min(max(centre + half, p), 1.0)
