import json
import math
import re

import numpy as np
import pytest
import tiny

from rope_jax import config
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.evals import Subject, check, evaluate, needle
from rope_jax.evals.common import pieces

PROSE = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 30_000))
NEEDLE = r"One of the special magic numbers for ([a-z]+-[a-z]+) is: ([1-9]\d{6})\.\n"


class BosTokenizer(ByteTokenizer):
  vocab_size, bos_id, adds_bos = 257, 256, True


def losses(tokens, seq_len):
  """Losses that depend on the token and its place."""
  assert tokens.shape[1] == seq_len
  return (tokens[:, 1:] % 11) / 10 + np.arange(1, seq_len) / seq_len


def subject(tokens=None, losses=losses):
  c = config.base()
  c.rope.context = 8192
  return Subject(c, tokens or ByteTokenizer(), losses)


def entry(tmp_path, documents=20, **options):
  for i in range(documents):
    (tmp_path / f"{i:02}.txt").write_text(PROSE[1000 * i : 1000 * i + 9000])
  return config.needle(files=str(tmp_path / "*.txt"), **options)


def made(e, s, length):
  return needle.samples(e, s, pieces(e, max(e.lengths), s), length)


@pytest.mark.parametrize("placement", needle.PLACEMENTS)
def test_sequences_are_worded_as_in_the_paper_and_exactly_as_long(tmp_path, placement):
  e = entry(tmp_path, placement=placement, lengths=(1000, 1500))
  for length in e.lengths:
    samples = made(e, subject(), length)
    assert len(samples) == 10
    for i, x in enumerate(samples):
      assert x.tokens.dtype == np.int32 and len(x.tokens) == length
      text = ByteTokenizer().decode(x.tokens)
      (name, number), *more = re.findall(NEEDLE, text)
      question = f"\nWhat is the special magic number for {name} mentioned in the provided text? "
      question += f"The special magic number for {name} mentioned in the provided text is {number}"
      assert not more and text.endswith(question)
      task = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
      )
      task += "I will quiz you about the number afterwards.\n"
      assert text.startswith(task)
      # What is left is the text, from its start.
      hidden = re.sub(r"\n?" + NEEDLE, "", text[len(task) :]).removesuffix(question)
      assert hidden == PROSE[1000 * i : 1000 * i + len(hidden)]


@pytest.mark.parametrize("tokens", ["bytes", "bos", "smollm2"])
def test_the_answer_decodes_to_the_number(tmp_path, tokens):
  if tokens == "smollm2":
    tokens = tiny.smollm2_tokenizer()
  else:
    tokens = BosTokenizer() if tokens == "bos" else ByteTokenizer()
  for x in made(entry(tmp_path, lengths=(700,)), subject(tokens), 700):
    text = tokens.decode([t for t in x.tokens if t != tokens.bos_id])
    assert tokens.decode(x.tokens[x.first :]) == re.findall(NEEDLE, text)[0][1]
    assert tokens.decode(x.tokens[: x.first][-30:]).endswith("provided text is ")
    assert len(x.tokens) == 700 and (x.tokens[0] == tokens.bos_id) == tokens.adds_bos


def test_a_token_that_joins_the_space_and_digits_is_of_the_answer():
  class Joining(ByteTokenizer):
    """' 6' is one token, as with tiktoken's tokenizers."""

    def encode(self, text):
      ids = [int(x[-1]) + 300 if len(x) == 2 else ord(x) for x in re.findall(r" \d|.", text, re.S)]
      return np.array(ids, np.int32)

    def decode(self, ids):
      return "".join(f" {i - 300}" if i >= 300 else chr(i) for i in ids)

  question, answer = needle.answered(Joining(), "it is", "6716097")
  assert Joining().decode(question) == "it is" and Joining().decode(answer) == " 6716097"


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("placement", needle.PLACEMENTS)
def test_only_the_answer_is_scored(tmp_path, placement, batch_size):
  e = entry(tmp_path, placement=placement, lengths=(1000,), batch_size=batch_size)
  result = evaluate(e, subject())["1000"]
  tokens = np.stack([x.tokens for x in made(e, subject(), 1000)])
  expected = losses(tokens, 1000)[:, -7:]
  assert (result["metric"], result["tokens"], result["samples"]) == ("ppl", 70, 10)
  assert result["nll"] == pytest.approx(expected.mean())
  assert result["ppl"] == pytest.approx(math.exp(expected.mean()))
  error = expected.mean(1).std(ddof=1) / math.sqrt(10)
  assert result["stderr"] == pytest.approx(result["ppl"] * error)
  assert json.loads(json.dumps(result)) == result
  assert result["placement"] == placement and ("by_depth" in result) == (placement == "spread")


def test_losses_elsewhere_do_not_matter(tmp_path):
  def huge(tokens, seq_len):
    out = np.full((len(tokens), seq_len - 1), 1e9)
    out[:, -7:] = 2.0
    return out

  result = evaluate(entry(tmp_path, lengths=(1000,)), subject(losses=huge))["1000"]
  assert result["nll"] == 2.0 and result["stderr"] == 0.0


def test_start_is_before_the_text_and_spread_is_over_it(tmp_path):
  def shares(placement):
    e = entry(tmp_path, placement=placement, num_samples=20, lengths=(4000,))
    for x in made(e, subject(), 4000):
      text = ByteTokenizer().decode(x.tokens)
      before, _, _, after = re.split(NEEDLE, text)
      before = len(before.split("\n")[1])
      yield before / (before + len(after.split("\n")[0]))

  assert set(shares("start")) == {0.0}
  spread = np.array(list(shares("spread")))
  assert (np.floor(spread * 10 + 1e-9) == np.arange(20) % 10).all()
  jitter = spread * 10 % 1
  assert jitter.min() < 0.2 and jitter.max() > 0.8


def test_depths_are_of_their_own_samples_and_add_up(tmp_path):
  def by_order(tokens, seq_len, seen=[]):  # noqa: B006 - the sample that it is
    seen.append(len(seen))
    return np.full((1, seq_len - 1), seen[-1] % 10 + seen[-1] // 10 / 10)

  e = entry(tmp_path, placement="spread", num_samples=20, lengths=(1000,))
  result = evaluate(e, subject(losses=by_order))["1000"]
  parts = result["by_depth"]
  assert [p["depth"] for p in parts] == pytest.approx(np.arange(10) / 10 + 0.05)
  assert [p["nll"] for p in parts] == pytest.approx(np.arange(10) + 0.05)
  assert {(p["samples"], p["tokens"]) for p in parts} == {(2, 14)}
  assert np.mean([p["nll"] for p in parts]) == pytest.approx(result["nll"])


def test_one_sample_has_no_standard_error(tmp_path):
  result = evaluate(entry(tmp_path, num_samples=1, lengths=(600,)), subject())["600"]
  assert "stderr" not in result and result["samples"] == 1


def test_the_seed_starts_anew_at_each_length(tmp_path):
  def numbers(length, seed=42):
    e = entry(tmp_path, lengths=(600, 1000), seed=seed)
    rows = made(e, subject(), length)
    return [ByteTokenizer().decode(x.tokens[x.first :]) for x in rows]

  assert numbers(600) == numbers(1000) == numbers(600)
  assert not set(numbers(600)) & set(numbers(600, seed=1))
  assert len(set(numbers(600))) == 10


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(placement="end"), "evals.n.placement='end'.*'spread'"),
    (dict(placement="spread", num_samples=5), "evals.n.num_samples=5.*multiple of 10"),
    (dict(num_samples=0), "evals.n.num_samples=0"),
    (dict(batch_size=0), "evals.n.batch_size=0"),
    (dict(start=-1), "evals.n.start=-1"),
    (dict(seed=-1), "evals.n.seed=-1"),
    (dict(files="tfds:pg19"), "evals.n.files='tfds:pg19'.*SPLIT"),
    (dict(lengths=(8193,)), "evals.n.lengths"),
  ],
)
def test_bad_settings_are_refused_by_key(options, message):
  with pytest.raises(ValueError, match=message):
    needle.validate("evals.n", config.needle(**options), subject().config)


def test_what_is_missing_is_found_before_training(tmp_path):
  s = subject()
  s.config.evals.n = entry(tmp_path, documents=3, lengths=(300, 6000), num_samples=3)
  with pytest.raises(ValueError, match="config.evals.n: lengths=300: expected more than the 3.."):
    check(s.config, s.tokenizer)
  s.config.evals.n.lengths = (600, 6000)
  check(s.config, s.tokenizer)
  s.config.evals.n.num_samples = 4
  with pytest.raises(ValueError, match="config.evals.n: num_samples=4.*has 3"):
    check(s.config, s.tokenizer)
