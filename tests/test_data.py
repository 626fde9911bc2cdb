import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny

from rope_jax.data import corpus
from rope_jax.data.batches import KEYS, Batches, prefetch
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.data.tokens import tokenize


class Documents(list):
  fingerprint = "test"


class EndingTokenizer(ByteTokenizer):
  """Bytes with BOS and EOS of its own."""

  vocab_size, bos_id, eos_id, adds_bos, fingerprint = 258, 256, 257, True, "ending"


def store(tmp_path, lengths, tokenizer=None, **options):
  texts = Documents(chr(97 + i % 26) * n for i, n in enumerate(lengths))
  options = dict(append_eos=False) | options
  return tokenize(texts, tokenizer or ByteTokenizer(), str(tmp_path), **options)


LENGTHS = [5, 40, 3, 17, 100, 1, 9, 64]


def make(tmp_path, **options):
  options = dict(length=16, batch_size=4, packing="pack", seed=3) | options
  return Batches(store(tmp_path, LENGTHS), **options)


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_a_batch_is_a_pure_function_of_seed_and_step(tmp_path, packing):
  a, b = make(tmp_path, packing=packing), make(tmp_path, packing=packing)
  for step in (7, 0, 30):  # in any order, across epochs
    for key in KEYS:
      np.testing.assert_array_equal(a(step)[key], b(step)[key])
  other = make(tmp_path, packing=packing, seed=4)
  assert any((a(s)["tokens"] != other(s)["tokens"]).any() for s in range(3))


def test_processes_share_a_batch_by_rows(tmp_path):
  batches = make(tmp_path)
  whole = batches(2)
  halves = [batches(2, slice(0, 2)), batches(2, slice(2, 4))]
  for key in KEYS:
    np.testing.assert_array_equal(whole[key], np.concatenate([h[key] for h in halves]))


def test_an_epoch_visits_every_token_once(tmp_path):
  batches = make(tmp_path, batch_size=1)
  total = sum(n for n in LENGTHS if n >= 2)
  assert batches.per_epoch == (total - 1) // 16
  seen = np.concatenate([batches(i)["tokens"][0] for i in range(batches.per_epoch)])
  order, _ = batches._epoch(0)
  stream = np.concatenate([batches.store[i] for i in order])
  np.testing.assert_array_equal(seen, stream[: len(seen)])
  assert sorted(order) == [i for i, n in enumerate(LENGTHS) if n >= 2]
  assert (batches._epoch(1)[0] != order).any()


def test_packed_documents_restart_positions_and_lose_no_weight_but_at_borders(tmp_path):
  batches = make(tmp_path, batch_size=8)
  for step in range(3):
    b = batches(step)
    for row in range(8):
      segments, positions = b["segment_ids"][row], b["positions"][row]
      starts = np.flatnonzero(np.diff(segments, prepend=-1))
      np.testing.assert_array_equal(positions[starts], 0)
      assert (np.diff(positions)[np.diff(segments) == 0] == 1).all()
      # Each document is one letter: the target is the same letter inside a document.
      inside = b["weights"][row] == 1
      assert (b["tokens"][row][inside] == b["targets"][row][inside]).all()
      np.testing.assert_array_equal(inside[:-1], np.diff(segments) == 0)


def test_one_document_per_sequence_is_cut_or_padded(tmp_path):
  batches = make(tmp_path, packing="document", batch_size=7)
  b = batches(0)
  for row, document in enumerate(batches._epoch(0)[0]):
    n = min(LENGTHS[document], 16)
    assert b["weights"][row].sum() == min(LENGTHS[document] - 1, 16)
    assert (b["tokens"][row][:n] == 97 + document).all() and not b["tokens"][row][n:].any()
    assert (b["segment_ids"][row][n:] == -1).all()


def test_short_documents_can_be_left_out(tmp_path):
  assert set(make(tmp_path, min_tokens=40).documents) == {1, 4, 7}
  with pytest.raises(ValueError, match="min_tokens=101"):
    make(tmp_path, min_tokens=101)


def test_a_corpus_too_small_for_a_sequence_is_refused(tmp_path):
  with pytest.raises(ValueError, match="data.length=1000"):
    make(tmp_path, length=1000)


def test_bos_and_eos_come_from_the_tokenizer(tmp_path):
  s = store(tmp_path, [3], EndingTokenizer(), append_eos=True)
  assert s[0].tolist() == [256, 97, 97, 97, 257]
  assert store(tmp_path, [3], EndingTokenizer())[0].tolist() == [256, 97, 97, 97]
  assert store(tmp_path, [3], append_eos=True)[0].tolist() == [97, 97, 97]

  class NotAdding(EndingTokenizer):  # has a BOS, as SmolLM2 does, and does not use it
    adds_bos, fingerprint = False, "not adding"

  assert store(tmp_path, [3], NotAdding())[0].tolist() == [97, 97, 97]


def test_the_token_cache_is_used_and_never_half_written(tmp_path):
  class Once(Documents):
    def __getitem__(self, i):
      if i == 1 and self.fails:
        raise KeyboardInterrupt
      return super().__getitem__(i)

  documents = Once(["abc", "de"])
  documents.fails = True
  with pytest.raises(KeyboardInterrupt):
    tokenize(documents, ByteTokenizer(), str(tmp_path), append_eos=False)
  documents.fails = False
  tokenize(documents, ByteTokenizer(), str(tmp_path), append_eos=False)
  documents.fails = True  # not read again
  again = tokenize(documents, ByteTokenizer(), str(tmp_path), append_eos=False)
  assert [again[i].tolist() for i in range(2)] == [[97, 98, 99], [100, 101]]


def test_prefetch_keeps_order_and_passes_errors_on():
  assert list(prefetch(lambda i: i * i, 2, 6)) == [4, 9, 16, 25]
  assert list(prefetch(lambda i: i, 3, 3)) == []
  with pytest.raises(ZeroDivisionError):
    list(prefetch(lambda i: 1 // (2 - i), 0, 5))


def test_a_folder_becomes_a_tfds_dataset_of_all_its_documents(tmp_path):
  folder = tiny.text_folder(tmp_path / "text", documents=40, characters=100)
  (tmp_path / "text" / "empty.txt").write_text("  \n")
  (tmp_path / "text" / "latin.txt").write_bytes(b"caf\xe9")
  splits = {s: corpus.documents(folder, s, str(tmp_path / "d")) for s in ("train", "validation")}
  texts = {split: [d[i] for i in range(len(d))] for split, d in splits.items()}
  assert len(texts["train"]) + len(texts["validation"]) == 41
  assert 1 <= len(texts["validation"]) <= 8
  assert "caf\N{REPLACEMENT CHARACTER}" in texts["train"] + texts["validation"]
  assert splits["train"].fingerprint != splits["validation"].fingerprint


def test_a_changed_file_makes_a_new_dataset(tmp_path):
  folder = tiny.text_folder(tmp_path / "text", documents=3, characters=50)
  before = corpus.documents(folder, "train", str(tmp_path / "d"))
  (tmp_path / "text" / "000.txt").write_text("something else")
  after = corpus.documents(folder, "train", str(tmp_path / "d"))
  assert before.fingerprint != after.fingerprint
  assert "something else" in [after[i] for i in range(len(after))]


def test_the_embedded_corpus_is_megabytes_of_long_documents():
  d = corpus.documents("stdlib", "train", corpus_dir())
  lengths = np.array([len(d[i]) for i in range(len(d))])
  assert lengths.sum() > 5e6 and lengths.max() > 100_000
  held_out = corpus.documents("stdlib", "validation", corpus_dir())
  assert not {d[i] for i in range(len(d))} & {held_out[i] for i in range(len(held_out))}


def test_catalogue_corpora_go_the_same_way(tmp_path):
  """pg19 cannot be downloaded everywhere: TFDS mocks its contents, our path is the real one."""
  with tfds.testing.mock_data(num_examples=3):
    for key in ("book_text", ""):  # it has only one feature of text
      d = corpus.documents("tfds:pg19", "train", str(tmp_path), key)
      assert len(d) == 3 and all(isinstance(d[i], str) and d[i] for i in range(3))
    with pytest.raises(ValueError, match="text_key='text'.*book_text"):
      corpus.documents("tfds:pg19", "train", str(tmp_path), "text")


def test_preparing_a_corpus_that_needs_tensorflow_says_so(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def prepare(*_, **__):
    raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
  with pytest.raises(ValueError, match=r"config.data.source='tfds:pg19'.*rope-jax\[catalogue\]"):
    corpus.documents("tfds:pg19", "train", str(tmp_path))


def test_a_missing_split_or_folder_is_refused(tmp_path):
  folder = tiny.text_folder(tmp_path / "text", documents=1)
  splits = [s for s in ("train", "validation") if not _has(folder, s, tmp_path)]
  assert len(splits) == 1
  with pytest.raises(ValueError, match="no text files"):
    corpus.documents(str(tmp_path / "nothing"), "train", str(tmp_path))


def _has(folder, split, tmp_path):
  try:
    return len(corpus.documents(folder, split, str(tmp_path / "d")))
  except ValueError as error:
    assert "no documents in split" in str(error)
    return 0


def corpus_dir():
  return os.environ["ROPE_JAX_DATA"]
