"""The tokenizer of an export: files of the base model as they are, or made from what we have."""

from __future__ import annotations

import os
import shutil

from rope_jax import reading
from rope_jax.export.files import write_json
from rope_jax.weights import locate
from rope_jax.weights.huggingface import inside

# What may make up a tokenizer in a Hugging Face directory: text, and SentencePiece's protobuf.
_FILES = (
  "tokenizer.json",
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "chat_template.json",
)
_CONFIG = "tokenizer_config.json"


def write(directory: str, name: str, init_from: str, context: int) -> tuple[list[str], dict]:
  """Writes the tokenizer and its chat template.

  Args:
    directory: of the export.
    name: config.tokenizer.
    init_from: the checkpoint of the base model, which '' is the tokenizer of.
    context: tokens that the exported model is for.

  Returns:
    (files, ids of special tokens by name in config.json); none where no tokenizer can be written.
  """
  if name == "byte":
    return _written(directory, _bytes(), dict(context=context))
  if name == "posgen":
    return [], {}  # numbers of a synthetic task, which are no text
  path = name or locate(init_from)[1]
  if path.endswith(".gguf"):
    from rope_jax.data import gguf_tokenizer
    from rope_jax.weights.gguf_file import GGUFSource

    tokenizer, info = gguf_tokenizer.read(GGUFSource(path))
    return _written(directory, tokenizer, dict(info, context=context))
  return _copied(directory, path, context)


def _copied(directory: str, path: str, context: int) -> tuple[list[str], dict]:
  source = path if os.path.isdir(path) else os.path.dirname(path)
  files = [file for file in _FILES if os.path.isfile(os.path.join(source, file))]
  if not os.path.isdir(path):  # one file, of whatever name
    shutil.copyfile(path, os.path.join(directory, _FILES[0]))
    files = [f for f in files if f != _FILES[0]] if os.path.basename(path) == _FILES[0] else []
  for file in files:
    shutil.copyfile(inside(source, file), os.path.join(directory, file))
  if not os.path.isdir(path):
    files.insert(0, _FILES[0])
  config = dict(tokenizer_class="PreTrainedTokenizerFast")
  if os.path.isfile(os.path.join(source, _CONFIG)):
    config = reading.read_object(inside(source, _CONFIG))
    config.pop("auto_map", None)  # code that is not here
  write_json(os.path.join(directory, _CONFIG), dict(config, model_max_length=context))
  return [*files, _CONFIG], {}


def _written(directory: str, tokenizer, info: dict) -> tuple[list[str], dict]:
  """Files of a `tokenizers.Tokenizer`; `info` as of `gguf_tokenizer.read`."""
  ids = {k: info.get(f"{k}_id") for k in ("bos", "eos", "unk", "pad")}
  ids = {k: v for k, v in ids.items() if v is not None}
  special = {f"{k}_token": tokenizer.id_to_token(v) for k, v in ids.items()}
  _add_special(tokenizer, special if info.get("adds_bos") else {}, info.get("adds_eos"))
  tokenizer.save(os.path.join(directory, "tokenizer.json"))
  config = dict(
    tokenizer_class="PreTrainedTokenizerFast",
    clean_up_tokenization_spaces=False,
    model_max_length=info["context"],
    **special,
  )
  if info.get("chat_template"):
    config["chat_template"] = info["chat_template"]
  write_json(os.path.join(directory, _CONFIG), config)
  return ["tokenizer.json", _CONFIG], {f"{k}_token_id": v for k, v in ids.items() if k != "unk"}


def _add_special(tokenizer, special: dict, adds_eos) -> None:
  """What the tokenizer puts around a text, as transformers and servers look for it."""
  from tokenizers.processors import Sequence, TemplateProcessing

  before = [special["bos_token"]] if "bos_token" in special else []
  after = [special["eos_token"]] if adds_eos and "eos_token" in special else []
  if not before + after:
    return
  template = TemplateProcessing(
    single=" ".join([*before, "$A", *after]),
    pair=" ".join([*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1",
                   *(f"{t}:1" for t in after)]),
    special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*before, *after}],
  )  # fmt: skip
  own = tokenizer.post_processor
  tokenizer.post_processor = Sequence([own, template]) if own else template


def _bytes():
  """UTF-8 bytes as tokens 0..255, as `rope_jax.data.tokenizer.ByteTokenizer` has them."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  # How byte-level BPE writes a byte as a character: itself if it can be seen, else from 256 on.
  seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
  unseen = [b for b in range(256) if b not in seen]
  characters = {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(unseen)}
  tokenizer = Tokenizer(models.BPE(vocab={c: b for b, c in characters.items()}, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer
