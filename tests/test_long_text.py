"""Long texts are encoded in pieces, and nobody can tell."""

import numpy as np
import pytest
import test_gguf_tokenizer as made
import tiny

from rope_jax.data import gguf_tokenizer, long_text, tokenizer
from rope_jax.weights.gguf_check import check

MOST = 1000


def of(path):
  t, _ = gguf_tokenizer.read(check(path))
  return lambda text: t.encode(text, add_special_tokens=False).ids


def kinds(path):
  """Tokenizers by kind: patterns, SentencePiece with and without a space before each text."""
  for pre in ("gpt-2", "smollm", "llama3", "qwen2", "tekken", "gpt-4o"):
    yield pre, of(made.write_bpe(path, pre))
  for prefix in (True, False):
    yield f"sentencepiece {prefix}", of(made.write_spm(path, add_space_prefix=prefix))
  yield "smollm2", tiny.smollm2_tokenizer()._ids


def text():
  """Prose, code, tables, scripts without spaces, and the text of special tokens, long and short."""
  return "\n\n".join([*made.corpus(), "<|im_start|>user <think> a<|im_end|> b", *made.TEXTS] * 2)


def test_ordinary_texts_have_the_same_tokens_in_pieces(tmp_path):
  whole = text()
  for kind, encode in kinds(tmp_path):
    for most in (MOST, 7 * MOST):
      pieces = list(long_text.pieces(encode, whole, most))
      assert len(pieces) >= len(whole) // most and max(map(len, pieces)) <= most
      assert [i for piece in pieces for i in encode(piece)] == encode(whole), kind


def test_a_text_that_is_not_long_is_one_piece():
  def never(text):
    raise AssertionError

  assert long_text.MOST >= 10**6  # most books, and every source file, go as they always did
  for n in (0, 1, MOST - 1, MOST):
    assert list(long_text.pieces(never, "x" * n, MOST)) == ["x" * n]


@pytest.mark.parametrize("letters", ["a", "0123456789", "abcdefghijklmnopqrstuvwxyz", "\n", "日本"])
def test_a_text_without_words_is_all_there(letters):
  rng = np.random.default_rng(0)
  whole = "".join(rng.choice(list(letters), 20 * MOST + 7))
  t = tiny.smollm2_tokenizer()
  pieces = list(long_text.pieces(t._ids, whole, MOST))
  assert len(pieces) > 20 and max(map(len, pieces)) <= MOST and "".join(pieces) == whole
  assert t.decode([i for piece in pieces for i in t._ids(piece)]) == whole


def test_a_text_that_cannot_be_cut_is_refused(tmp_path):
  encode = of(made.write_spm(tmp_path))  # it puts a space before each text
  with pytest.raises(ValueError, match="5,000 characters.* no place"):
    list(long_text.pieces(encode, "x" * 5000, MOST))


def test_the_tokenizer_encodes_in_pieces(monkeypatch):
  t = tiny.smollm2_tokenizer()
  whole, seen = text(), []
  expected = t.encode(whole)
  assert expected.dtype == np.int32
  ids = tokenizer.Tokenizer._ids
  monkeypatch.setattr(tokenizer.Tokenizer, "_ids", lambda t, x: seen.append(len(x)) or ids(t, x))
  monkeypatch.setattr(long_text.pieces, "__defaults__", (MOST,))
  np.testing.assert_array_equal(t.encode(whole), expected)
  assert max(seen) <= MOST


def test_half_of_a_surrogate_pair_is_an_error():
  for t in (tiny.smollm2_tokenizer(), tokenizer.ByteTokenizer()):
    with pytest.raises(ValueError, match="surrogates not allowed"):
      t.encode("a\ud800b")
