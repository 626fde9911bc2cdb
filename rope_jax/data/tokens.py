"""Token caches: a corpus tokenised once, then random access to the tokens of any document."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile

import numpy as np
from tqdm import tqdm


class TokenStore:
  """Tokens of a corpus in a memory-mapped file: store[i] is document i, int32.

  Attributes:
    lengths: [documents] tokens of each.
    unscored: tokens at the start of each, after BOS, that training does not score.
  """

  unscored = 0

  def __init__(self, path: str):
    self.offsets = np.load(os.path.join(path, "offsets.npy"))
    file = os.path.join(path, "tokens.bin")
    empty = os.path.getsize(file) == 0
    self._tokens = np.zeros(0, np.int32) if empty else np.memmap(file, np.int32, "r")
    self.lengths = np.diff(self.offsets)

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, i: int) -> np.ndarray:
    return np.asarray(self._tokens[self.offsets[i] : self.offsets[i + 1]])

  def slice(self, i: int, start: int, stop: int) -> np.ndarray:
    """Tokens start .. stop of document i, without reading the rest."""
    first = self.offsets[i]
    return np.asarray(self._tokens[first + start : min(first + stop, self.offsets[i + 1])])


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
  """
  key = f"{documents.fingerprint}|{tokenizer.fingerprint}|{append_eos}"
  path = os.path.join(data_dir, "tokens", hashlib.sha256(key.encode()).hexdigest()[:24])
  if not os.path.exists(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = tempfile.mkdtemp(dir=os.path.dirname(path))
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    eos = [tokenizer.eos_id] if append_eos and tokenizer.eos_id is not None else []
    offsets = [0]
    with open(os.path.join(temporary, "tokens.bin"), "wb") as f:
      for i in tqdm(range(len(documents)), desc="tokenize", unit="doc", disable=None):
        ids = np.concatenate([bos, tokenizer.encode(documents[i]), eos]).astype(np.int32)
        f.write(ids.tobytes())
        offsets.append(offsets[-1] + len(ids))
    np.save(os.path.join(temporary, "offsets.npy"), np.asarray(offsets, np.int64))
    os.chmod(temporary, 0o755)  # mkdtemp's is for its owner alone; a cache may be shared
    try:
      os.rename(temporary, path)
    except OSError:  # another process was first
      shutil.rmtree(temporary)
  return TokenStore(path)
