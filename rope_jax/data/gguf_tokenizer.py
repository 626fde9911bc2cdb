"""The tokenizer that a GGUF file carries, as a `tokenizers.Tokenizer`.

Patterns and defaults by the names in tokenizer.ggml.pre: llama.cpp src/llama-vocab.cpp, and
transformers 5.23 integrations/gguf/gguf_tokenizer_mapping.py, which has the originals of those that
llama.cpp rewrites for its own engine.
"""

from __future__ import annotations

from rope_jax import reading

# Kinds of token, tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
  r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# pre -> the pattern that splits a text, for those that are not GPT-2's.
_PATTERNS = {
  **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "dbrx"), _LLAMA3),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
  "tekken": _TEKKEN,
  "gpt-4o": _GPT4O,
}
_GPT2 = ("gpt-2", "default")
_DIGITS = ("smollm", "starcoder", "refact")  # each digit on its own, the rest as GPT-2
# In these, a word that is a token is not taken apart, and BOS is added unless the file says no.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")


def read(source) -> tuple:
  """The tokenizer of a GGUF file and what the file says about it.

  Args:
    source: has `path` and `field(name, default)`: a `weights.gguf_file.GGUFSource`, or the Header
      of `weights.gguf_check.check`, which needs no weights.

  Returns:
    (`tokenizers.Tokenizer`, info). info: bos_id, eos_id, unk_id and pad_id (or None), adds_bos and
    adds_eos (whether a text is put between them when the model is used), chat_template (Jinja, or
    None). The tokenizer itself adds neither.

  Raises:
    ValueError: naming the file and what is missing, damaged or not supported.
  """
  try:
    return _Reader(source).read()
  except _Refused as error:
    raise reading.refusal(source.path, error) from error


class _Refused(ValueError):
  """What is wrong, without the name of the file."""


class _Reader:
  def __init__(self, source):
    self.source = source
    self.tokens = self.listed("tokens", str)
    self.types = self.listed("token_type", int)
    self.ids = {token: i for i, token in enumerate(self.tokens)}
    if len(self.types) != len(self.tokens):
      raise _Refused(f"{len(self.tokens)} tokens and {len(self.types)} types of tokens")
    if len(self.ids) != len(self.tokens):
      raise _Refused("a token of the tokenizer is there twice")

  def read(self) -> tuple:
    from tokenizers import AddedToken, Tokenizer

    model = self.source.field("tokenizer.ggml.model")
    pre = self.source.field("tokenizer.ggml.pre", "default")
    if model not in ("gpt2", "llama"):
      raise _Refused(
        f"tokenizer model {model!r} is not supported; set config.tokenizer to the tokenizer.json "
        "of the same model"
      )
    unk = self.token_id("unknown")
    with reading.foreign(self.source.path, "the tokenizer cannot be built", (_Refused,)):
      if model == "gpt2":
        tokenizer = Tokenizer(self.byte_level_bpe(pre in _WHOLE_WORDS))
        self.add_byte_level(tokenizer, pre)
      else:
        tokenizer = Tokenizer(self.sentencepiece_bpe(unk))
        self.add_spaces(tokenizer)
      for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        texts = [t for t, k in zip(self.tokens, self.types) if k == kind]
        added = [AddedToken(t, special=special, normalized=False) for t in texts]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    info = dict(
      bos_id=self.token_id("bos"),
      eos_id=self.token_id("eos"),
      unk_id=unk,
      pad_id=self.token_id("padding"),
      adds_bos=self.flag("add_bos_token", model == "llama" or pre in _WHOLE_WORDS),
      adds_eos=self.flag("add_eos_token", False),
      chat_template=self.source.field("tokenizer.chat_template"),
    )
    if not isinstance(info["chat_template"], str | None):
      raise _Refused("tokenizer.chat_template is not a string")
    return tokenizer, info

  def byte_level_bpe(self, whole_words: bool):
    from tokenizers import models

    merges = self.merges()
    # Not passed where it is the default: it would change the fingerprints of earlier versions.
    options = dict(ignore_merges=True) if whole_words else {}
    return models.BPE(vocab=self.ids, merges=merges, **options)

  def add_byte_level(self, tokenizer, pre: str) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _GPT2:
      tokenizer.pre_tokenizer = byte_level
    elif pre in _DIGITS:
      digits = pre_tokenizers.Digits(individual_digits=True)
      tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif isinstance(pre, str) and pre in _PATTERNS:
      split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
      byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
      tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
      if _PATTERNS[pre] is _QWEN2:  # as the model's own tokenizer has it; llama.cpp leaves it out
        tokenizer.normalizer = normalizers.NFC()
    else:
      raise _Refused(
        f"pre-tokenizer {pre!r} is not supported ({', '.join((*_GPT2, *_DIGITS, *_PATTERNS))} "
        "are); set config.tokenizer to the tokenizer.json of the same model"
      )
    tokenizer.decoder = decoders.ByteLevel()

  def sentencepiece_bpe(self, unk: int | None):
    from tokenizers import models

    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
      if self.source.field(f"tokenizer.ggml.{key}"):
        raise _Refused(f"tokenizer.ggml.{key} is not supported for tokenizer model 'llama'")
    if unk is None:
      unk = next((i for i, kind in enumerate(self.types) if kind == _UNKNOWN), None)
    has_merges = self.source.field("tokenizer.ggml.merges") is not None
    return models.BPE(
      vocab=self.ids,
      merges=self.merges() if has_merges else self.merges_of_scores(),
      unk_token=None if unk is None else self.tokens[unk],
      fuse_unk=True,
      byte_fallback=True,
    )

  def merges(self) -> list[tuple[str, str]]:
    merges = [tuple(m.split(" ")) for m in self.listed("merges", str)]
    if any(len(m) != 2 for m in merges):
      raise _Refused("a merge of the tokenizer is not a pair")
    return merges

  def merges_of_scores(self) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint piece scores highest, so pieces give merges.

    Each piece can be made of any two pieces that it consists of. The order of equal scores is that
    of transformers' `generate_merges`; control, user-defined and byte tokens are not made of text.
    """
    scores = self.listed("scores", float)
    if len(scores) != len(self.tokens):
      raise _Refused(f"{len(self.tokens)} tokens and {len(scores)} scores")
    if not all(score == score for score in scores):
      raise _Refused("a score of the tokenizer is not a number")
    normal = {t: i for t, i in self.ids.items() if self.types[i] == _NORMAL}
    merges = []
    for piece, i in normal.items():
      pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
      merges += [(scores[i], len(a), len(b), a, b) for a, b in pairs if a in normal and b in normal]
    merges.sort(key=lambda m: m[:3], reverse=True)
    return [m[3:] for m in merges]

  def add_spaces(self, tokenizer) -> None:
    """Spaces are pieces of their own; by default a text is given one more at its beginning.

    Also where the text begins with a space, and after each special token, as in llama.cpp and the
    tokenizer.json of Llama 2. (The `Metaspace` of transformers' LlamaTokenizer does neither.)
    """
    from tokenizers import decoders, normalizers

    prefix = self.flag("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
      [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )

  def listed(self, key: str, kind: type) -> list:
    values = self.source.field(f"tokenizer.ggml.{key}")
    if values is None:
      raise _Refused(f"no metadata 'tokenizer.ggml.{key}'")
    if not isinstance(values, list) or (values and type(values[0]) is not kind):
      raise _Refused(f"metadata 'tokenizer.ggml.{key}' is not a list of {kind.__name__}")
    return values

  def flag(self, key: str, default: bool) -> bool:
    value = self.source.field(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
      raise _Refused(f"metadata 'tokenizer.ggml.{key}' is {value!r}, not a boolean")
    return value

  def token_id(self, key: str) -> int | None:
    value = self.source.field(f"tokenizer.ggml.{key}_token_id")
    if value is None:
      return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
      raise _Refused(f"tokenizer.ggml.{key}_token_id={value!r} is not one of the tokens")
    return value
