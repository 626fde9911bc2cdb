"""Tokenizers of GGUF files against transformers' and against SentencePiece's rule, written out."""

import functools
import json
import pydoc_data.topics
import unicodedata

import gguf_files
import numpy as np
import pytest

from rope_jax.data import gguf_tokenizer, tokenizer
from rope_jax.weights.gguf_check import check

TEXTS = (
  "The capital of France is Paris.",
  "  def f(x):\n\treturn x**2  # naïve — 日本語 \U0001f600\U0001f468‍\U0001f469‍\U0001f467\n\n\n  ",
  "don't we'll I'M WE'RE 3.14159 2026-11-22 1234567 ½ ² ٣٤ Ⅷ",
  "a  b   c    d\r\n\r\n\ttabs\t\tand /paths//here\n/x",
  "HTTPServer camelCase ǅungla İstanbul ÉCOLE Straße",
  "\x00\x01\x7f\ufeff\U0010ffff",
  " one leading space", "trailing space ", " ", "\n", "x", "",
)  # fmt: skip
CHAT = "<|im_start|>user\nhi<|im_end|><think>"
ADDED = {"<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4}
PRES = ("gpt-2", "default", "smollm", "starcoder", "refact", "llama3", "llama-v3", "llama-bpe",
        "dbrx", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o")  # fmt: skip


@functools.cache
def corpus():
  topics = list(pydoc_data.topics.topics.values())[:12]
  return [*topics, *TEXTS, "日本語 日本 naïve naïve 3.14 2026 2026 don't don't WE'RE" * 5]


@functools.cache
def byte_level():
  """Pieces and merges, trained across GPT-2's words, so that patterns of other kinds matter."""
  import tokenizers as hf

  t = hf.Tokenizer(hf.models.BPE())
  t.pre_tokenizer = hf.pre_tokenizers.Sequence(
    [
      hf.pre_tokenizers.Split(hf.Regex(r"\S+\s*|\s+"), "isolated"),
      hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
  trainer = hf.trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
  t.train_from_iterator(corpus(), trainer)
  vocab = t.get_vocab()
  merges = json.loads(t.to_str())["model"]["merges"]
  return sorted(vocab, key=vocab.get), [" ".join(m) for m in merges]


@functools.cache
def pieces():
  """SentencePiece's: unknown, two controls, 256 bytes, then pieces by falling score."""
  import tokenizers as hf

  t = hf.Tokenizer(hf.models.BPE())
  t.pre_tokenizer = hf.pre_tokenizers.Metaspace(split=True)
  trainer = hf.trainers.BpeTrainer(vocab_size=500, limit_alphabet=90, show_progress=False)
  t.train_from_iterator([x for x in corpus() if "▁" not in x], trainer)
  vocab = sorted(t.get_vocab(), key=t.get_vocab().get)
  # As SentencePiece has them: joined pieces by rank first, single characters behind them.
  vocab = [p for p in vocab if len(p) > 1] + [p for p in vocab if len(p) == 1]
  special, of_bytes = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
  types = [2, 3, 3] + [6] * 256 + [1] * len(vocab)
  scores = [0.0] * 259 + [-float(i) for i in range(len(vocab))]
  return special + of_bytes + vocab, types, scores


def write(path, tokens, types, arch="llama", added=None, **keys):
  added = ADDED if added is None else added
  fields = {
    "tokenizer.ggml.tokens": [*tokens, *added],
    "tokenizer.ggml.token_type": [*types, *added.values()],
  }
  for key, value in keys.items():
    if value is None:
      continue
    name = "tokenizer." + ("" if key == "chat_template" else "ggml.") + key
    value = [*value, *[-1000.0] * len(added)] if key == "scores" else value
    fields[name] = value
  return gguf_files.write(path / "m.gguf", arch, {}, fields)


def write_bpe(path, pre, **keys):
  tokens, merges = byte_level()
  return write(path, tokens, [1] * len(tokens), model="gpt2", pre=pre, merges=merges, **keys)


def write_spm(path, **keys):
  tokens, types, scores = pieces()
  return write(path, tokens, types, **dict(model="llama", scores=scores) | keys)


def ids(t, text):
  return t.encode(text, add_special_tokens=False).ids


def theirs(path):
  from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

  architecture, parts, _ = get_gguf_tokenizer(path)
  return convert_gguf_tokenizer(architecture, parts)[0]


@pytest.mark.parametrize("pre", PRES)
def test_byte_level_tokens_are_transformers_own(tmp_path, pre):
  path = write_bpe(tmp_path, pre)
  ours, _ = gguf_tokenizer.read(check(path))
  them = theirs(path)
  texts = [*corpus(), CHAT]
  if pre in ("smollm", "starcoder", "refact"):  # transformers 5.23 drops their rule of digits
    texts = ["".join("#" if c.isnumeric() else c for c in text) for text in texts]
    assert len(ids(ours, "2026 ½²")) == len("2026 ") + len("½²".encode())
  for text in texts:
    text = unicodedata.normalize("NFC", text)
    assert ids(ours, text) == ids(them, text), text
    assert ours.decode(ids(ours, text), skip_special_tokens=False) == text
  assert ours.decode(ids(ours, CHAT)) == "user\nhi<think>"
  assert ours.token_to_id("<think>") == len(byte_level()[0]) + 2


def test_qwen_composes_characters_as_its_own_tokenizer_does(tmp_path):
  from transformers import Qwen2Tokenizer

  tokens, merges = byte_level()
  vocab = {t: i for i, t in enumerate(tokens)}
  them = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges])
  ours, _ = gguf_tokenizer.read(check(write_bpe(tmp_path, "qwen2")))
  for text in (*TEXTS, "nai\u0308ve e\u0301"):
    assert ids(ours, text) == them.encode(text, add_special_tokens=False)
  assert ours.decode(ids(ours, "e\u0301")) == "\u00e9"


def test_words_that_are_tokens_stay_whole_where_the_model_has_it_so(tmp_path):
  """ignore_merges of Llama 3 and of Mistral's tekken: no merge leads to this word."""
  tokens, merges = byte_level()
  word = "zqxj"
  for pre, whole in (("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)):
    path = write(tmp_path, [*tokens, word], [1] * (len(tokens) + 1), model="gpt2", pre=pre,
                 merges=merges)  # fmt: skip
    ours, info = gguf_tokenizer.read(check(path))
    assert (ids(ours, word) == [len(tokens)]) == whole
    assert info["adds_bos"] == whole


def sentencepiece(text, prefix=True):
  """llm_tokenizer_spm of llama.cpp: join the best-scored neighbours, leftmost first, until none."""
  tokens, _, scores = pieces()
  score = {t: (s, i) for i, (t, s) in enumerate(zip(tokens, scores)) if i >= 259}
  parts = list((("▁" if prefix and text else "") + text).replace(" ", "▁"))
  while True:
    pairs = [a + b for a, b in zip(parts, parts[1:])]
    found = [(-score[pair][0], i) for i, pair in enumerate(pairs) if pair in score]
    if not found:
      break
    i = min(found)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  out = []
  for part in parts:
    out += [score[part][1]] if part in score else [3 + b for b in part.encode()]
  return out


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_tokens_are_those_of_its_rule(tmp_path, prefix):
  path = write_spm(tmp_path, **({} if prefix is None else dict(add_space_prefix=prefix)))
  ours, _ = gguf_tokenizer.read(check(path))
  for text in (*TEXTS, *[t[:400] for t in corpus()[:5]]):
    assert ids(ours, text) == sentencepiece(text, prefix is not False), text
    assert ours.decode(ids(ours, text)) == text
  assert max(map(len, pieces()[0][259:])) > 4 and len(ids(ours, "The function is")) < 12
  assert len(ids(ours, "\U0010ffff")) == 4 + (prefix is not False)  # bytes


def test_sentencepiece_tokens_are_transformers_own(tmp_path):
  """Of the architecture for which transformers, too, puts a space before every text."""
  path = write_spm(tmp_path, arch="phi3")
  ours, _ = gguf_tokenizer.read(check(path))
  them = theirs(path)
  for text in (*corpus(), CHAT):
    assert ids(ours, text) == ids(them, text), text


def test_sentencepiece_merges_of_the_file_are_used(tmp_path):
  """Rather than the scores."""
  tokens = ["<unk>", "a", "b", "c", "ab", "bc", "▁"]
  options = dict(model="llama", scores=[0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0], added={})
  types = [2] + [1] * 6
  ours, _ = gguf_tokenizer.read(check(write(tmp_path, tokens, types, **options)))
  assert [tokens[i] for i in ids(ours, "abc")] == ["▁", "ab", "c"]
  options["merges"] = ["b c", "a b"]
  ours, info = gguf_tokenizer.read(check(write(tmp_path, tokens, types, **options)))
  assert [tokens[i] for i in ids(ours, "abc")] == ["▁", "a", "bc"]
  assert ids(ours, "a\U0001f600\U0001f600b")[2:-1] == [0]  # no bytes here: unknown
  assert info["unk_id"] is None


def test_equal_scores_keep_the_order_of_transformers(tmp_path):
  tokens = ["<unk>", "▁", "a", "aa", "aaa", "aaaa"]
  scores = [0.0, -9.0, -9.0, -1.0, -1.0, -1.0]
  path = write(tmp_path, tokens, [2, 1, 1, 1, 1, 1], "phi3", {}, model="llama", scores=scores)
  ours, them = gguf_tokenizer.read(check(path))[0], theirs(path)
  for n in range(12):
    assert ids(ours, "a" * n) == ids(them, "a" * n)


def test_text_that_looks_like_a_byte_is_not_one(tmp_path):
  tokens = ["<unk>", "<0x41>", "▁", "<", "0", "x", "4", "1", ">", "<0", "x4", "<0x4", "1>"]
  types = [2, 6] + [1] * 11
  path = write(tmp_path, tokens, types, added={}, model="llama", scores=[0.0] * len(tokens))
  ours, _ = gguf_tokenizer.read(check(path))
  assert [tokens[i] for i in ids(ours, "<0x41>")] == ["▁", "<0x4", "1>"]
  assert ours.decode(ids(ours, "<0x41>")) == "<0x41>"


def test_what_the_file_says_of_itself(tmp_path):
  keys = dict(bos_token_id=0, eos_token_id=2, unknown_token_id=3, padding_token_id=5)
  keys |= dict(add_eos_token=True, chat_template="{{ x }}")
  _, info = gguf_tokenizer.read(check(write_spm(tmp_path, **keys)))
  assert info == dict(bos_id=0, eos_id=2, unk_id=3, pad_id=5, adds_bos=True, adds_eos=True,
                      chat_template="{{ x }}")  # fmt: skip
  _, info = gguf_tokenizer.read(check(write_spm(tmp_path, add_bos_token=False)))
  assert not info["adds_bos"]
  _, info = gguf_tokenizer.read(check(write_bpe(tmp_path, "qwen2")))
  none = dict.fromkeys(("bos_id", "eos_id", "unk_id", "pad_id", "chat_template"))
  assert info == none | dict(adds_bos=False, adds_eos=False)


def test_the_tokenizer_of_a_file_is_loaded_by_its_name(tmp_path):
  t = tokenizer.load(write_bpe(tmp_path, "llama-bpe", bos_token_id=7, eos_token_id=8))
  assert (t.bos_id, t.eos_id, t.adds_bos) == (7, 8, True)
  for text in TEXTS:
    assert t.decode(t.encode(text)) == text
  other = tokenizer.load(write_bpe(tmp_path, "dbrx", bos_token_id=7, eos_token_id=8))
  assert other.fingerprint != t.fingerprint
  assert t.encode("").dtype == np.int32


def test_caches_of_the_packaged_model_keep_their_names():
  """Their names have the fingerprint in them; made with tokenizers 0.23."""
  assert tokenizer.load("", "smollm2-135m").fingerprint == "19b0a2daa8a59176"


@pytest.mark.parametrize(
  "keys, message",
  [
    (dict(pre="viking"), "pre-tokenizer 'viking' is not supported .*gpt-2.*tokenizer.json"),
    (dict(pre=3), "pre-tokenizer 3 is not supported"),
    (dict(model="bert"), "tokenizer model 'bert' is not supported; .*tokenizer.json"),
    (dict(model="llama", merges=None), "no metadata 'tokenizer.ggml.scores'"),
    (dict(model="llama", merges=None, scores=[1.0]), "tokens and 4 scores"),
    (dict(model="llama", merges=None, scores=[float("nan")] * 900), "score .* not a number"),
    (dict(merges=["a b c"]), "not a pair"),
    (dict(merges=["zz yy"]), "cannot be built"),
    (dict(merges=[1]), "'tokenizer.ggml.merges' is not a list of str"),
    (dict(bos_token_id=100_000), "bos_token_id=100000 is not one of the tokens"),
    (dict(bos_token_id=True), "bos_token_id=True"),
    (dict(add_bos_token=1), "add_bos_token' is 1, not a boolean"),
    (dict(chat_template=1), "chat_template is not a string"),
  ],
)
def test_tokenizers_that_cannot_be_read_are_refused(tmp_path, keys, message):
  tokens, merges = byte_level()
  keys = dict(model="gpt2", pre="gpt-2", merges=merges) | keys
  path = write(tmp_path, tokens, [1] * len(tokens), **keys)
  with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
    gguf_tokenizer.read(check(path))


def test_spaces_that_would_be_dropped_and_tokens_that_would_be_lost_are_refused(tmp_path):
  for key, value in dict(remove_extra_whitespaces=True, precompiled_charsmap=[1]).items():
    with pytest.raises(ValueError, match=f"m.gguf: tokenizer.ggml.{key}"):
      gguf_tokenizer.read(check(write_spm(tmp_path, **{key: value})))
  for tokens, types, message in ((["a", "a"], [1, 1], "twice"), (["a"], [1, 1], "1 tokens and 2")):
    path = write(tmp_path, tokens, types, added={}, model="gpt2", merges=["a a"])
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
      gguf_tokenizer.read(check(path))
  with pytest.raises(ValueError, match="m.gguf: no metadata 'tokenizer.ggml.tokens'"):
    gguf_tokenizer.read(check(gguf_files.write(tmp_path / "m.gguf")))
