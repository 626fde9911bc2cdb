"""Tokenizers: bytes, and everything that the `tokenizers` library reads or can be built from."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

from rope_jax.data.posgen import PosGenTokenizer
from rope_jax.weights import locate


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
    with open(config_file) as f:
      config = json.load(f)
    for key in ("bos_token", "eos_token"):
      token = config.get(key)
      token = token.get("content") if isinstance(token, dict) else token
      special[key] = tokenizer.token_to_id(token) if token else None
  # What the post-processor does to an empty text says whether it adds BOS.
  added = tokenizer.encode("").ids
  bos, eos = special.get("bos_token"), special.get("eos_token")
  if bos is None and added and added[0] != eos:
    bos = added[0]
  return Tokenizer(tokenizer, bos, eos, adds_bos=bool(added) and added[0] == bos)


def _from_gguf(path: str) -> Tokenizer:
  from tokenizers import AddedToken
  from tokenizers import Tokenizer as HFTokenizer

  from rope_jax.weights.source import GGUFSource

  source = GGUFSource(path)
  model = source.field("tokenizer.ggml.model")
  tokens = source.field("tokenizer.ggml.tokens")
  types = source.field("tokenizer.ggml.token_type")
  if model == "gpt2":
    tokenizer = HFTokenizer(_byte_level_bpe(source, path, tokens))
    pre = source.field("tokenizer.ggml.pre", "default")
    tokenizer.pre_tokenizer, tokenizer.decoder = _byte_level(pre, path)
  else:
    raise ValueError(
      f"{path}: tokenizer model {model!r} is not supported; set config.tokenizer to the "
      "tokenizer.json of the same model"
    )
  control = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == 3]
  tokenizer.add_special_tokens(control)
  user = [AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, types) if k == 4]
  tokenizer.add_tokens(user)
  ids = {k: source.reader.fields.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos")}
  ids = {k: None if f is None else int(f.contents()) for k, f in ids.items()}
  adds_bos = source.reader.fields.get("tokenizer.ggml.add_bos_token")
  adds_bos = bool(adds_bos is not None and adds_bos.contents())
  return Tokenizer(tokenizer, ids["bos"], ids["eos"], adds_bos)


def _byte_level_bpe(source, path: str, tokens: list[str]):
  from tokenizers import models

  merges = [tuple(m.split(" ")) for m in source.field("tokenizer.ggml.merges")]
  if any(len(m) != 2 for m in merges):
    raise ValueError(f"{path}: a merge of the tokenizer is not a pair")
  return models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)


def _byte_level(pre: str, path: str):
  """Pre-tokenizer and decoder by the name that GGUF files carry."""
  from tokenizers import decoders, pre_tokenizers

  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  known = {
    "gpt-2": byte_level,
    "default": byte_level,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
  }
  if pre not in known:
    raise ValueError(
      f"{path}: pre-tokenizer {pre!r} is not supported ({', '.join(known)} are); set "
      "config.tokenizer to the tokenizer.json of the same model"
    )
  return known[pre], decoders.ByteLevel()
