"""Token caches: a corpus tokenised once, then random access to the tokens of any document."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile

import numpy as np
from tqdm import tqdm

from rope_jax import reading


class TokenStore:
  """Tokens of a corpus in a memory-mapped file: store[i] is document i, int32.

  Args:
    path: of the cache.
    vocab_size: tokens that there are.

  Attributes:
    lengths: [documents] tokens of each.
    unscored: tokens at the start of each, after BOS, that training does not score.

  Raises:
    ValueError: naming the file, if the cache is damaged; also later, where a document has a token
      that is not in the vocabulary.
  """

  unscored = 0

  def __init__(self, path: str, vocab_size: int = 2**31):
    self._file, self._vocab_size = os.path.join(path, "tokens.bin"), vocab_size
    file = os.path.join(path, "offsets.npy")
    self.offsets = _offsets(file)
    _check_plain(self._file)
    size = os.path.getsize(self._file)
    if size != 4 * int(self.offsets[-1]):
      what = f"{size} bytes for {self.offsets[-1]} tokens of 4 bytes"
      raise _damaged(self._file, what)
    self._tokens = np.memmap(self._file, np.int32, "r") if size else np.zeros(0, np.int32)
    self.lengths = np.diff(self.offsets)

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, i: int) -> np.ndarray:
    return self._read(self.offsets[i], self.offsets[i + 1])

  def slice(self, i: int, start: int, stop: int) -> np.ndarray:
    """Tokens start .. stop of document i, without reading the rest."""
    first = self.offsets[i]
    return self._read(first + start, min(first + stop, self.offsets[i + 1]))

  def _read(self, start: int, stop: int) -> np.ndarray:
    ids = np.asarray(self._tokens[start:stop])
    # As unsigned numbers, negative ones are large.
    if ids.size and ids.view(np.uint32).max() >= self._vocab_size:
      wrong = ids[ids.view(np.uint32) >= self._vocab_size][0]
      raise _damaged(self._file, f"token {wrong} is none of {self._vocab_size}")
    return ids


def tokenize(documents, tokenizer, data_dir: str, *, append_eos: bool) -> TokenStore:
  """Tokenises a corpus into a cache, or opens the cache that is there.

  A document is [BOS] text [EOS]: BOS only if the tokenizer itself adds one, EOS if asked for and
  the tokenizer has one. The cache appears whole or not at all: it is written beside its place and
  renamed.

  Args:
    documents: from `corpus.documents`.
    tokenizer: from `tokenizer.load`.
    data_dir: where caches live.
    append_eos: end each document with EOS.

  Raises:
    ValueError: if the cache cannot be written, or, naming the file, the one there is is damaged.
  """
  key = f"{documents.fingerprint}|{tokenizer.fingerprint}|{append_eos}"
  path = os.path.join(data_dir, "tokens", hashlib.sha256(key.encode()).hexdigest()[:24])
  if not os.path.exists(path):
    try:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      temporary = tempfile.mkdtemp(dir=os.path.dirname(path))
      try:
        _write(temporary, documents, tokenizer, append_eos)
        os.rename(temporary, path)
      finally:
        shutil.rmtree(temporary, ignore_errors=True)  # where it did not come to the new name
    except OSError as error:
      if not os.path.exists(path):  # otherwise another process was first
        raise ValueError(f"config.data.dir={data_dir!r}: {error.strerror or error}") from error
  return TokenStore(path, tokenizer.vocab_size)


def _write(directory: str, documents, tokenizer, append_eos: bool) -> None:
  bos = np.asarray([tokenizer.bos_id] if tokenizer.adds_bos else [], np.int32)
  ends = append_eos and tokenizer.eos_id is not None
  eos = np.asarray([tokenizer.eos_id] if ends else [], np.int32)
  offsets = [0]
  with open(os.path.join(directory, "tokens.bin"), "wb") as f:
    for i in tqdm(range(len(documents)), desc="tokenize", unit="doc", disable=None):
      try:
        ids = tokenizer.encode(documents[i])
      except ValueError as error:
        raise ValueError(f"config.data.source: document {i}: {error}") from error
      ids = np.concatenate([bos, ids, eos])
      f.write(ids.tobytes())
      offsets.append(offsets[-1] + len(ids))
  np.save(os.path.join(directory, "offsets.npy"), np.asarray(offsets, np.int64))
  os.chmod(directory, 0o755)  # mkdtemp's is for its owner alone; a cache may be shared


def _offsets(file: str) -> np.ndarray:
  """int64 [documents + 1], where each begins and the last one ends."""
  _check_plain(file)
  try:
    offsets = np.load(file, allow_pickle=False)
  except Exception as error:  # numpy parses the header as Python, and raises what that raises
    raise _damaged(file, error) from None
  right = isinstance(offsets, np.ndarray) and offsets.dtype == np.int64 and offsets.ndim == 1
  if not right or not offsets.size or offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
    raise _damaged(file, "no ascending whole numbers from 0")
  return offsets


def _check_plain(file: str) -> None:
  try:
    reading.check_plain(file)
  except ValueError as error:
    raise _damaged(file, error) from None


def _damaged(file: str, what) -> ValueError:
  error = reading.refusal(file, f"the token cache is damaged ({reading.line(str(what))})")
  directory = os.path.dirname(file)
  return ValueError(f"config.data.dir: {error}; delete {directory}, and it is made again")
