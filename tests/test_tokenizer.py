import json

import pytest
import tokenizers

from rope_jax import weights
from rope_jax.data import tokenizer

TEXTS = (
  "The capital of France is Paris.",
  "  def f(x):\n\treturn x**2  # naïve — 日本語 \U0001f600\n\n\n",
  "don't we'll I'M 3.14159 2026-11-22",
  "<|im_start|>user\nhi<|im_end|>",
  "",
)


def smollm2():
  try:
    return weights.locate("smollm2-135m")[1]
  except ValueError as error:
    pytest.fail(str(error))


def test_bytes_round_trip():
  t = tokenizer.load("byte")
  for text in TEXTS:
    assert t.decode(t.encode(text)) == text
  assert t.encode("é").tolist() == [195, 169]


def test_gguf_tokenizer_round_trips_and_knows_its_special_tokens():
  t = tokenizer.load("", "smollm2-135m")
  for text in TEXTS[:3]:
    assert t.decode(t.encode(text)) == text
  assert (t.vocab_size, t.bos_id, t.eos_id, t.adds_bos) == (49152, 1, 2, False)
  assert t.encode(TEXTS[3])[0] == 1 and t.encode(TEXTS[3])[-1] == 2


def test_gguf_tokenizer_equals_transformers_where_it_applies():
  """Digits apart: transformers 5.23 drops SmolLM's rule that each digit is a token."""
  from transformers import AutoTokenizer

  path = smollm2()
  directory, file = path.rsplit("/", 1)
  theirs = AutoTokenizer.from_pretrained(directory, gguf_file=file)
  ours = tokenizer.load("", "smollm2-135m")
  import pydoc_data.topics

  texts = [*TEXTS[:2], *pydoc_data.topics.topics.values()]
  letters = ["".join("#" if c.isdigit() else c for c in text) for text in texts]
  for text in letters:
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
  assert len(ours.encode("123456")) == 6


def save(path, adds_bos, bos="<s>"):
  t = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, []))
  t.add_special_tokens(["<s>", "</s>"])
  if adds_bos:
    t.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 2)]
    )
  t.enable_truncation(4)
  t.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps(dict(bos_token=bos, eos_token="</s>")))
  return str(path)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("bos", ["<s>", dict(content="<s>"), None])
def test_bos_is_added_only_where_the_tokenizer_itself_does(tmp_path, adds_bos, bos):
  t = tokenizer.load(save(tmp_path, adds_bos, bos))
  assert t.adds_bos == adds_bos
  assert t.bos_id == (2 if bos or adds_bos else None) and t.eos_id == 3
  assert t.encode("abab").tolist() == [0, 1, 0, 1]


def test_a_stored_truncation_does_not_cut_documents(tmp_path):
  assert len(tokenizer.load(save(tmp_path, False)).encode("ab" * 50)) == 100


def test_fingerprints_tell_tokenizers_apart(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  a, b = (tokenizer.load(save(tmp_path / d, d == "a")) for d in "ab")
  (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="<s>")))
  c = tokenizer.load(str(tmp_path / "b"))  # the same file, but another EOS
  assert c.eos_id != b.eos_id
  assert len({t.fingerprint for t in (a, b, c, tokenizer.load("byte"))}) == 4


def test_a_missing_tokenizer_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no tokenizer.json"):
    tokenizer.load(str(tmp_path))
