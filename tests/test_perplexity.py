import math

import numpy as np
import pytest

from rope_jax import config, report, results
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.evals import Subject, evaluate
from rope_jax.evals.perplexity import windows

TEXT = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 500))


class BosTokenizer(ByteTokenizer):
  vocab_size, bos_id, adds_bos = 257, 256, True


def fake_losses(tokens, seq_len):
  """Losses that depend on the token and on how much precedes it in the window."""
  assert tokens.shape[1] == seq_len
  place = np.arange(1, seq_len)
  return 1 + (tokens[:, 1:] % 7) / 10 + tokens[:, :1] / 1000 + 1 / place


def run(tmp_path, tokenizer=None, texts=(TEXT,), **options):
  for i, text in enumerate(texts):
    (tmp_path / f"{i}.txt").write_text(text)
  c = config.base()
  c.rope.context = 4096
  entry = config.perplexity(files=str(tmp_path / "*.txt"), **options)
  return evaluate(entry, Subject(c, tokenizer or ByteTokenizer(), fake_losses))


def test_truncate_is_one_window_from_the_start(tmp_path):
  ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
  for n, result in run(tmp_path, protocol="truncate", lengths=(64, 256)).items():
    losses = fake_losses(ids[None, : int(n)], int(n))[0]
    assert result["tokens"] == int(n) - 1 and result["windows"] == 1
    assert result["ppl"] == pytest.approx(math.exp(losses.mean()))
    assert result["nll"] == pytest.approx(losses.mean())
    error = losses.std() / math.sqrt(len(losses)) * result["ppl"]
    assert result["stderr"] == pytest.approx(error)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("L, stride, N", [(64, 16, 256), (64, 24, 250), (64, 64, 200), (50, 7, 50)])
def test_sliding_scores_every_token_once_with_the_most_context(tmp_path, bos, L, stride, N):
  tokenizer = BosTokenizer() if bos else ByteTokenizer()
  result = run(
    tmp_path, tokenizer, protocol="sliding", lengths=(L,), stride=stride, document_tokens=N
  )[str(L)]
  ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)[:N]
  prefix, body = ([256], L - 1) if bos else ([], L)
  losses, end = {}, 0
  while end < N:  # brute force: the end of the window moves by the stride
    new_end = body if end == 0 else min(end + min(stride, body), N)
    window = np.concatenate([prefix, ids[new_end - body : new_end]])
    values = fake_losses(window[None], L)[0]
    for token in range(end, new_end):
      place = token - (new_end - body) + len(prefix)
      if place > 0:
        losses[token] = values[place - 1]
    end = new_end
  if bos or stride < L:  # else the first token of a window has nothing to be predicted from
    assert sorted(losses) == list(range(0 if bos else 1, N))
  assert result["tokens"] == len(losses)
  assert result["nll"] == pytest.approx(np.mean(list(losses.values())))


def test_sliding_all_scores_all_tokens_of_all_windows(tmp_path):
  options = dict(protocol="sliding_all", lengths=(64,), stride=32, document_tokens=200)
  result = run(tmp_path, **options)["64"]
  ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
  losses = [fake_losses(ids[None, s : s + 64], 64)[0] for s in range(0, 200 - 64 + 1, 32)]
  assert result["windows"] == len(losses) == 5
  assert result["nll"] == pytest.approx(np.mean(losses))


def test_the_protocols_are_not_the_same_number(tmp_path):
  options = dict(lengths=(64,), stride=16, document_tokens=256)
  sliding, all_ = (run(tmp_path, protocol=p, **options) for p in ("sliding", "sliding_all"))
  truncate = run(tmp_path, protocol="truncate", lengths=(64,))
  assert len({r["64"]["ppl"] for r in (sliding, all_, truncate)}) == 3


def test_batch_size_changes_nothing(tmp_path):
  options = dict(lengths=(32, 64), stride=8, num_samples=3, document_tokens=100)
  results = [run(tmp_path, batch_size=b, **options) for b in (1, 4)]
  for n in ("32", "64"):
    assert results[0][n]["ppl"] == pytest.approx(results[1][n]["ppl"], rel=1e-12)
    assert results[0][n]["tokens"] == results[1][n]["tokens"]


def test_positions_divide_the_window_and_add_up(tmp_path):
  result = run(tmp_path, protocol="truncate", lengths=(100,), buckets=8)["100"]
  parts = result["by_position"]
  assert [p["start"] for p in parts[1:]] == [p["end"] for p in parts[:-1]]
  assert (parts[0]["start"], parts[-1]["end"], len(parts)) == (0, 100, 8)
  assert [p["tokens"] for p in parts] == [p["end"] - max(p["start"], 1) for p in parts]
  mean = sum(p["tokens"] * math.log(p["ppl"]) for p in parts) / result["tokens"]
  assert mean == pytest.approx(result["nll"])
  assert parts[0]["ppl"] > parts[-1]["ppl"]  # by construction of the losses


def test_samples_come_from_the_start_of_every_document_first(tmp_path):
  texts = ("a" * 130, "b" * 300, "c" * 20, "d" * 100)
  seen = []

  def losses(tokens, seq_len):
    seen.append(chr(tokens[0, 0]))
    return np.ones((1, seq_len - 1))

  for i, text in enumerate(texts):
    (tmp_path / f"{i}.txt").write_text(text)
  entry = config.perplexity(
    files=f"{tmp_path}/*.txt", lengths=(100,), protocol="truncate", num_samples=5
  )
  c = config.base()
  evaluate(entry, Subject(c, ByteTokenizer(), losses))
  assert seen == ["a", "b", "d", "b", "b"]
  entry.num_samples = 6
  with pytest.raises(ValueError, match="num_samples=6.*has 5"):
    evaluate(entry, Subject(c, ByteTokenizer(), losses))


def test_start_is_a_character_offset(tmp_path):
  a = run(tmp_path, protocol="truncate", lengths=(64,), start=100)
  b = run(tmp_path, protocol="truncate", lengths=(64,), texts=(TEXT[100:],))
  assert a == b


def test_a_bos_that_the_tokenizer_does_not_add_itself_is_not_added(tmp_path):
  class NotAdding(BosTokenizer):
    adds_bos = False

  options = dict(protocol="truncate", lengths=(64,))
  assert run(tmp_path, NotAdding(), **options) == run(tmp_path, **options)
  assert run(tmp_path, BosTokenizer(), **options) != run(tmp_path, **options)


def test_windows_all_have_the_same_length():
  for protocol in ("sliding", "sliding_all", "truncate"):
    for start, scored in windows(protocol, 1000, 128, 50, 1):
      assert 0 <= start <= 1000 - 128 and start < scored < start + 128


def test_results_of_different_texts_are_told_apart(tmp_path):
  texts = [TEXT[100:200], TEXT[:300], TEXT[200:]]  # the first is too short for more than 64
  options = dict(protocol="truncate", num_samples=2, texts=texts)
  short, long, again = (
    run(tmp_path, lengths=lengths, **options) for lengths in ((64,), (64, 256), (64, 200))
  )
  assert short["64"]["text"] != long["64"]["text"] == again["64"]["text"]
  assert results.mixed(dict(a=short, b=long)) == ["64"]
  assert results.mixed(dict(a=again, b=long, c={"64": {}})) == []
  table = report.table(dict(a=dict(perplexity=short), b=dict(perplexity=long)))
  assert "Not of one text in all runs, so not comparable: 64 (" in table
  same = report.table(dict(a=dict(perplexity=again), b=dict(perplexity=long)))
  assert "Not of one text" not in same
