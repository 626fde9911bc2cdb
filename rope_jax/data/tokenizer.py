"""Tokenizers: bytes, and everything that the `tokenizers` library reads or can be built from."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from rope_jax import reading
from rope_jax.data import gguf_tokenizer, long_text
from rope_jax.data.posgen import PosGenTokenizer
from rope_jax.weights import gguf_check, locate

_MOST_TOKENS = 1 << 24  # the library counts up to the largest id when it writes itself down


class ByteTokenizer:
  """UTF-8 bytes as tokens 0..255; no special tokens."""

  vocab_size = 256
  bos_id = None
  eos_id = None
  adds_bos = False
  fingerprint = "bytes"

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def decode(self, ids) -> str:
    return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class Tokenizer:
  """A `tokenizers.Tokenizer` with what the data needs to know of special tokens.

  Attributes:
    vocab_size: above the id of every token, added ones included, and at least their number.
    bos_id, eos_id: ids, or None.
    adds_bos: whether the tokenizer itself puts BOS before a text. Nothing else decides.
    fingerprint: changes when the tokenizer does; part of the name of token caches.

  Raises:
    ValueError: naming the file, if its tokens have ids that no model has, or, later, if the library
      fails on a text.
  """

  def __init__(self, path: str, tokenizer, bos_id: int | None, eos_id: int | None, adds_bos: bool):
    self.path, self._tokenizer = path, tokenizer
    ids = tokenizer.get_vocab().values()
    self.vocab_size = max(len(ids), 1 + max(ids, default=-1))
    if self.vocab_size > _MOST_TOKENS:
      raise reading.refusal(path, f"a token has the id {self.vocab_size - 1}")
    for special in (bos_id, eos_id):
      if special is not None and special >= self.vocab_size:  # its post-processor makes it up
        raise reading.refusal(path, f"the special token {special} is none of the vocabulary")
    self.bos_id, self.eos_id, self.adds_bos = bos_id, eos_id, adds_bos
    state = f"{tokenizer.to_str()}|{bos_id}|{eos_id}|{adds_bos}"
    self.fingerprint = hashlib.sha256(state.encode()).hexdigest()[:16]

  def encode(self, text: str) -> np.ndarray:
    """int32 ids of the text alone, without BOS or EOS.

    Raises:
      ValueError: if the text has half of a surrogate pair, or is too long and nowhere to be cut.
    """
    text.encode("utf-8")  # raises for what the library has no error of its own for
    parts = [np.asarray(self._ids(x), np.int32) for x in long_text.pieces(self._ids, text)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  def _ids(self, text: str) -> list[int]:
    with reading.foreign(self.path, "the tokenizer cannot encode"):
      return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids) -> str:
    with reading.foreign(self.path, "the tokenizer cannot decode"):
      return self._tokenizer.decode([int(i) for i in ids])


def load(name: str, init_from: str = "", modulus: int = 0):
  """The tokenizer of a config.

  Args:
    name: 'byte', 'posgen', a tokenizer.json or a directory with one, a .gguf file, or '' for the
      one of init_from.
    init_from: a checkpoint; see `rope_jax.weights.locate`.
    modulus: of PosGen.

  Returns:
    A `ByteTokenizer`, a `PosGenTokenizer` or a `Tokenizer`, which have the same attributes.

  Raises:
    ValueError: if there is none, or it is of a kind that is not supported.
  """
  if name == "byte":
    return ByteTokenizer()
  if name == "posgen":
    return PosGenTokenizer(modulus)
  path = name
  if not name:
    kind, path = locate(init_from)
    if kind == "run":
      raise ValueError("it must be given, since init_from is a run")
  if path.endswith(".gguf"):
    return _from_gguf(path)
  return _from_json(path)


def _from_json(path: str) -> Tokenizer:
  import tokenizers

  directory = path if os.path.isdir(path) else os.path.dirname(path)
  file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
  if not os.path.lexists(file):
    raise reading.refusal(directory or ".", "no tokenizer.json")
  reading.check_plain(file)
  with reading.foreign(file, "no tokenizer that can be read"):
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # What the post-processor does to an empty text says whether it adds BOS.
    added = tokenizer.encode("").ids
  special = _special(tokenizer, os.path.join(directory, "tokenizer_config.json"))
  bos, eos = special.get("bos_token"), special.get("eos_token")
  if bos is None and added and added[0] != eos:
    bos = added[0]
  return Tokenizer(file, tokenizer, bos, eos, adds_bos=bool(added) and added[0] == bos)


def _special(tokenizer, file: str) -> dict[str, int | None]:
  """The ids of the tokens that tokenizer_config.json names, where there is one."""
  if not os.path.lexists(file):
    return {}
  config, out = reading.read_object(file), {}
  for key in ("bos_token", "eos_token"):
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
      raise reading.refusal(file, f"{key}={token!r}: expected a token")
    with reading.foreign(file, key):  # half of a surrogate pair is no text
      out[key] = tokenizer.token_to_id(token) if token else None
  return out


def _from_gguf(path: str) -> Tokenizer:
  tokenizer, info = gguf_tokenizer.read(gguf_check.check(path))
  return Tokenizer(path, tokenizer, info["bos_id"], info["eos_id"], info["adds_bos"])
