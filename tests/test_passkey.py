import json
import re

import numpy as np
import pytest
import tiny

from rope_jax import config
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.evals import Subject, check, evaluate, passkey
from rope_jax.evals.prompts import longest


class FourLetters(ByteTokenizer):
  """About as many tokens as a real tokenizer: four ASCII letters each."""

  def encode(self, text):
    padded = text + "\0" * (-len(text) % 4)
    digits = np.frombuffer(padded.encode("ascii"), np.uint8).reshape(-1, 4).astype(np.int32)
    return digits @ np.array([1, 128, 128**2, 128**3], np.int32)

  def decode(self, ids):
    letters = np.asarray(ids)[:, None] // np.array([1, 128, 128**2, 128**3]) % 128
    return bytes(letters.astype(np.uint8).ravel().tolist()).decode("ascii").rstrip("\0")


class Oracle(Subject):
  """Reads the key in the prompt; `change` spoils its answers."""

  def __init__(self, tokens, context=8192, change=lambda key: key):
    c = config.base()
    c.rope.context = context
    seen = []

    def generate(prompts, max_new_tokens, batch_size=1, what="", until=None):
      seen.extend(prompts)
      text = [tokens.decode(p) for p in prompts]
      keys = [int(re.search(r"The pass key is (\d+)\. Remember", t)[1]) for t in text]
      return [tokens.encode(f" {change(k)}. The 7")[:max_new_tokens] for k in keys]

    super().__init__(c, tokens, None, generate)
    object.__setattr__(self, "seen", seen)


def places(text):
  task, before, line, after, question = text.split("\n")
  assert (task, question) == (passkey.TASK, passkey.QUESTION)
  key = int(re.fullmatch(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", line)[1])
  return key, before, after


def test_prompt_is_the_published_one():
  assert passkey.prompt("yarn", 71, 95, 3) == (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "The g\nThe pass key is 71. Remember it. 71 is the pass key.\nThe\n"
    "What is the pass key? The pass key is"
  )
  _, before, after = places(passkey.prompt("pose", 71, 2, 0))
  assert before == passkey.FILLER + passkey.FILLER and after == ""


@pytest.mark.parametrize("rule", passkey.RULES)
def test_depth_is_exact(rule):
  entry = config.passkey(rule=rule, depths=5, num_samples=2)
  unit = 1 if rule == "yarn" else len(passkey.FILLER)
  samples = passkey.prompts(entry, Oracle(FourLetters()), 2048)
  assert [depth for depth, *_ in samples] == [d for d in (0, 0.25, 0.5, 0.75, 1) for _ in range(2)]
  for depth, key, ids in samples:
    found, before, after = places(FourLetters().decode(ids))
    assert found == key
    assert len(before) // unit == round(depth * ((len(before) + len(after)) // unit))
    assert len(before) % unit == len(after) % unit == 0


@pytest.mark.parametrize("rule", passkey.RULES)
def test_random_places_reach_both_ends(rule):
  entry = config.passkey(rule=rule, num_samples=60)
  shares = []
  for depth, _, ids in passkey.prompts(entry, Oracle(FourLetters()), 1024):
    assert depth is None
    _, before, after = places(FourLetters().decode(ids))
    shares.append(len(before) / len(before + after))
  assert min(shares) < 0.1 and max(shares) > 0.9 and 0.35 < np.mean(shares) < 0.65


def test_prompts_are_the_longest_that_fit():
  entry = config.passkey(depths=3, num_samples=3, max_new_tokens=12)
  for _, _, ids in passkey.prompts(entry, Oracle(ByteTokenizer()), 1000):
    assert len(ids) + 12 == 1000  # a byte is a token


@pytest.mark.parametrize("length", [512, 4096])
def test_prompts_are_the_longest_that_fit_a_real_tokenizer(length):
  tokens = tiny.smollm2_tokenizer()
  entry = config.passkey(depths=2, num_samples=3)
  for depth, _, ids in passkey.prompts(entry, Oracle(tokens), length):
    key, before, after = places(tokens.decode(ids))
    n = len(before) + len(after) + 1
    more = passkey.prompt("yarn", key, round(depth * n), n - round(depth * n))
    assert len(ids) + 10 <= length < len(tokens.encode(more)) + 10


def test_longest_is_where_the_next_does_not_fit():
  rng = np.random.default_rng(0)
  for _ in range(200):
    slope, low, limit = rng.uniform(0.05, 40), int(rng.integers(5)), int(rng.integers(50, 5000))
    noise = rng.integers(0, int(slope) + 1, 200_000)
    sizes = []

    def ids(n, slope=slope, noise=noise, sizes=sizes):
      sizes.append(n)
      return np.zeros(20 + int(slope * n) + noise[n], np.int32)

    found = longest(ids, limit, low, int(rng.integers(2 * limit)))
    if found is None:
      assert len(ids(low)) > limit
      continue
    calls = len(sizes)
    n, fits = found
    assert n >= low and len(fits) == len(ids(n)) <= limit < len(ids(n + 1))
    assert calls < 40


def test_pose_counts_as_llama_does():
  entry = config.passkey(rule="pose", num_samples=4)
  for length, context, filler in ((2048, 8192, 79), (4096, 8192, 161), (4096, 4096, 157)):
    for _, _, ids in passkey.prompts(entry, Oracle(FourLetters(), context), length):
      _, before, after = places(FourLetters().decode(ids))
      assert len(before) + len(after) == filler * len(passkey.FILLER)


def test_pose_refuses_a_tokenizer_that_its_count_does_not_fit():
  entry = config.passkey(rule="pose", lengths=(2048,))
  for run in (passkey.check, passkey.evaluate):
    with pytest.raises(ValueError, match="rule='pose'.*length 2048.*'yarn'"):
      run(entry, Oracle(ByteTokenizer()))


@pytest.mark.parametrize("rule", passkey.RULES)
def test_the_oracle_is_always_right_and_its_neighbour_never(rule):
  options = dict(rule=rule, lengths=(1024, 2048), depths=3, num_samples=2)
  for change, accuracy in ((lambda k: k, 1.0), (lambda k: k + 1, 0.0), (lambda k: "", 0.0)):
    result = evaluate(config.passkey(**options), Oracle(FourLetters(), change=change))
    assert list(result) == ["1024", "2048"]
    assert json.loads(json.dumps(result)) == result
    for column in result.values():
      assert (column["metric"], column["accuracy"], column["samples"]) == ("accuracy", accuracy, 6)
      assert column["low"] <= accuracy <= column["high"] and column["low"] < column["high"]
      assert column["threshold"] == 0.8
      assert [d["depth"] for d in column["by_depth"]] == [0.0, 0.5, 1.0]
      assert {(d["accuracy"], d["samples"]) for d in column["by_depth"]} == {(accuracy, 2)}


def test_accuracy_is_by_depth():
  answers = iter([True, True, True, False, False, False])
  subject = Oracle(FourLetters(), change=lambda k: k if next(answers) else "none")
  result = evaluate(config.passkey(lengths=(512,), depths=3, num_samples=2), subject)["512"]
  assert [d["accuracy"] for d in result["by_depth"]] == [1.0, 0.5, 0.0]
  assert result["accuracy"] == 0.5


def test_random_depths_have_no_table():
  result = evaluate(config.passkey(lengths=(512,)), Oracle(FourLetters()))["512"]
  assert "by_depth" not in result and result["samples"] == 10


def test_the_first_integer_counts_and_all_of_it():
  assert passkey.answer(" 123, or 45") == 123
  assert passkey.answer("is: 0123.") == 123
  assert passkey.answer(" 12345") != 1234
  assert passkey.answer("unknown") is None


def test_keys_cover_the_range_and_start_anew_at_each_length():
  entry = config.passkey(num_samples=100)
  a, b, again = (passkey.prompts(entry, Oracle(FourLetters()), n) for n in (512, 768, 512))
  keys = [key for _, key, _ in a]
  assert keys == [key for _, key, _ in b]
  assert all((x[2] == y[2]).all() for x, y in zip(a, again))
  assert 1 <= min(keys) < 5000 and 45_000 < max(keys) <= 50_000
  entry.seed = 43
  assert keys != [key for _, key, _ in passkey.prompts(entry, Oracle(FourLetters()), 512)]


def test_a_template_is_around_the_prompt_and_counts():
  entry = config.passkey(lengths=(600,), num_samples=2, template="<user>{prompt}</user> {x}")
  subject = Oracle(ByteTokenizer())
  assert evaluate(entry, subject)["600"]["accuracy"] == 1
  for ids in subject.seen:
    text = ByteTokenizer().decode(ids)
    assert text.startswith("<user>There is an") and text.endswith("pass key is</user> {x}")
    assert len(ids) == 590


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(rule="llama"), "evals.p.rule='llama'.*'pose'"),
    (dict(depths=1), "evals.p.depths=1"),
    (dict(num_samples=0), "evals.p.num_samples=0"),
    (dict(max_new_tokens=0), "evals.p.max_new_tokens=0"),
    (dict(batch_size=0), "evals.p.batch_size=0"),
    (dict(seed=-1), "evals.p.seed=-1"),
    (dict(template="prompt"), "evals.p.template='prompt'"),
    (dict(lengths=(8193,)), r"evals.p.lengths=\(8193,\).*context=8192"),
  ],
)
def test_bad_settings_are_refused_by_key(options, message):
  with pytest.raises(ValueError, match=message):
    passkey.validate("evals.p", config.passkey(**options), Oracle(ByteTokenizer()).config)


def test_a_length_that_no_prompt_fits_in_is_found_before_training():
  subject = Oracle(ByteTokenizer())
  subject.config.evals.key = config.passkey(lengths=(200, 1000))
  with pytest.raises(ValueError, match="config.evals.key: lengths=200.*tokens"):
    check(subject.config, subject.tokenizer)
  with pytest.raises(ValueError, match="lengths=200"):
    evaluate(subject.config.evals.key, subject)
  subject.config.evals.key.lengths = (1000,)
  check(subject.config, subject.tokenizer)
  subject.config.evals.key.update(rule="pose", lengths=(60,))
  with pytest.raises(ValueError, match="lengths=60"):
    check(subject.config, subject.tokenizer)
