"""Tokenizers: bytes, and everything that the `tokenizers` library reads or can be built from."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

from rope_jax.data import gguf_tokenizer
from rope_jax.data.posgen import PosGenTokenizer
from rope_jax.weights import gguf_check, locate


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
    vocab_size: size of the vocabulary, added tokens included.
    bos_id, eos_id: ids, or None.
    adds_bos: whether the tokenizer itself puts BOS before a text. Nothing else decides.
    fingerprint: changes when the tokenizer does; part of the name of token caches.
  """

  def __init__(self, tokenizer, bos_id: int | None, eos_id: int | None, adds_bos: bool):
    self._tokenizer = tokenizer
    self.vocab_size = tokenizer.get_vocab_size()
    self.bos_id, self.eos_id, self.adds_bos = bos_id, eos_id, adds_bos
    state = f"{tokenizer.to_str()}|{bos_id}|{eos_id}|{adds_bos}"
    self.fingerprint = hashlib.sha256(state.encode()).hexdigest()[:16]

  def encode(self, text: str) -> np.ndarray:
    """int32 ids of the text alone, without BOS or EOS."""
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids) -> str:
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
  if not os.path.exists(file):
    raise ValueError(f"no tokenizer.json in {directory}")
  tokenizer = tokenizers.Tokenizer.from_file(file)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  special = {}
  config_file = os.path.join(directory, "tokenizer_config.json")
  if os.path.exists(config_file):
    try:
      with open(config_file, encoding="utf-8") as f:
        config = dict(json.load(f))
    except (OSError, TypeError, ValueError) as error:
      raise ValueError(f"{config_file} cannot be read: {error}") from None
    for key in ("bos_token", "eos_token"):
      token = config.get(key)
      token = token.get("content") if isinstance(token, dict) else token
      if not isinstance(token, str | None):
        raise ValueError(f"{config_file}: {key}={token!r}: expected a token")
      special[key] = tokenizer.token_to_id(token) if token else None
  # What the post-processor does to an empty text says whether it adds BOS.
  added = tokenizer.encode("").ids
  bos, eos = special.get("bos_token"), special.get("eos_token")
  if bos is None and added and added[0] != eos:
    bos = added[0]
  return Tokenizer(tokenizer, bos, eos, adds_bos=bool(added) and added[0] == bos)


def _from_gguf(path: str) -> Tokenizer:
  tokenizer, info = gguf_tokenizer.read(gguf_check.check(path))
  return Tokenizer(tokenizer, info["bos_id"], info["eos_id"], info["adds_bos"])
