"""PosGen: its rules, splits and batches, the predictions of a model, and their accuracy."""

import json
import math

import jax
import numpy as np
import pytest
import tiny
from conftest import ROOT
from test_config import load

from rope_jax import config, report, resolve, rope, validate
from rope_jax.data import posgen, tokenizer
from rope_jax.data.batches import KEYS, Batches
from rope_jax.evals import Subject, evaluate
from rope_jax.model.llama import unembedding
from rope_jax.train import loop, sharding, state
from rope_jax.train import step as step_lib
from rope_jax.train.predict import most_likely


def block(**options):
  p = config.base().data.posgen
  p.update(options)
  return p


def some(task, n=20, length=256, modulus=17, far=1, near=3):
  drawn = np.random.default_rng(0).integers(0, modulus, (n, far + near))
  return posgen.sequences(task, drawn, length, modulus=modulus, far=far)


# ---- Rules.


@pytest.mark.parametrize(
  "task, after",
  [
    ("recursive", [6, 3, 6, 2, 3, 0, 4, 2]),
    ("cot", [6, 5, 0, 6, 6, 0, 0, 1]),
    ("semi_recursive", [6, 5, 5, 2, 1, 4, 1, 0]),
  ],
)
def test_figure_2_of_the_paper(task, after):
  found = posgen.sequences(task, np.array([[2, 0, 3, 1]]), 12, modulus=7, far=1)
  assert found[0].tolist() == [2, 0, 3, 1, *after]


@pytest.mark.parametrize("far, near", [(1, 3), (2, 1), (3, 2)])
def test_every_token_is_the_sum_of_its_far_and_near_tokens(far, near):
  n = far + near
  start = dict(recursive=lambda i: i - n, cot=lambda i: 0, semi_recursive=lambda i: (i - n) // 2)
  for task in posgen.TASKS:
    for x in some(task, 3, 40, 11, far, near).tolist():
      for i in range(n, 40):
        p = start[task](i)
        assert x[i] == (sum(x[p : p + far]) + sum(x[i - near : i])) % 11


@pytest.mark.parametrize(
  "task, period, parts", [("recursive", 4912, (2, 307)), ("cot", 96, (2, 3))]
)
def test_streams_repeat_after_their_published_period_and_not_before(task, period, parts):
  x = some(task, 5, 4 + 2 * period)[:, 4:]
  assert (x[:, period:] == x[:, :-period]).all()
  for prime in parts:
    assert (x[:, period // prime :] != x[:, : -period // prime]).any(1).all()


@pytest.mark.parametrize("far, near", [(1, 3), (2, 2)])
def test_near_tokens_alone_give_all_but_every_second_token_of_semi_recursive(far, near):
  def share(task, back):
    x = some(task, 500, far=far, near=near)
    n = far + near
    right = x[:, n + 1 :] == (2 * x[:, n:-1] - x[:, n - back : -1 - back]) % 17
    return right[:, ::2].mean(), right[:, 1::2].mean()  # the first of a pair of tokens is second

  assert share("recursive", far + near) == share("cot", near) == (1, 1)
  second, first = share("semi_recursive", near)
  assert second == 1 and first == pytest.approx(1 / 17, abs=0.005)


# ---- Splits.


def test_disjoint_splits_use_every_tuple_once():
  p = block(train_sequences=17**4 - 2000)
  every = np.concatenate([posgen.seeds(p, split) for split in posgen.SPLITS])
  assert len(every) == 83_521 == len(np.unique(every, axis=0))
  assert [len(posgen.seeds(block(), split)) for split in posgen.SPLITS] == [10_000, 1000, 1000]


def test_the_test_split_is_that_of_its_own_seed_and_of_nothing_else():
  def test(**options):
    return posgen.seeds(block(**options), "test")

  np.testing.assert_array_equal(test(), test(train_sequences=5, task="cot"))
  assert (test() != test(seed=1)).any()


def test_released_splits_repeat_and_are_trained_on():
  p = block(mode="combinations")
  train, val, test = (posgen.examples(p, split, 64) for split in posgen.SPLITS)
  known = {tuple(row) for row in train}
  assert (len(train), len(known)) == (10_000, 2380)
  assert train[:2, 1:5].tolist() == [[0, 1, 2, 3], [0, 1, 2, 4]]
  np.testing.assert_array_equal(train[2380:4760], train[:2380])
  np.testing.assert_array_equal(np.concatenate([val, test]), train[:2000])
  held_out = posgen.examples(block(), "test", 64)
  known = {tuple(row) for row in posgen.examples(block(), "train", 64)}
  assert len(known) == 10_000 and not known & {tuple(row) for row in held_out}


def test_the_vocabulary_is_the_digits_and_five_names():
  t = tokenizer.load("posgen", modulus=17)
  assert (t.vocab_size, t.bos_id, t.eos_id, t.adds_bos) == (22, 21, 21, True)
  assert t.encode("2 0 3 16").tolist() == [2, 0, 3, 16]
  assert t.encode("[UNK] [PAD] [CLS] [SEP] [EOS]").tolist() == [17, 18, 19, 20, 21]
  assert t.decode(t.encode("[EOS] 2 0 3 1")) == "[EOS] 2 0 3 1"
  with pytest.raises(ValueError, match="'17' is no token"):
    t.encode("2 17")
  assert t.fingerprint != tokenizer.load("posgen", modulus=7).fingerprint


# ---- Batches.


def batches(seed=3, batch_size=4, length=12, **options):
  store = posgen.Sequences(block(train_sequences=20, **options), length)
  return Batches(store, length=length, batch_size=batch_size, packing="document", seed=seed)


def test_a_row_is_eos_and_a_sequence_whose_seed_is_not_scored():
  b = batches()(0)
  assert set(b) == set(KEYS)
  x = b["targets"]
  assert (b["tokens"][:, 0] == 21).all()
  np.testing.assert_array_equal(b["tokens"][:, 1:], x[:, :-1])
  follows = posgen.sequences("semi_recursive", x[:, :4], 12, modulus=17, far=1)
  np.testing.assert_array_equal(x, follows)
  np.testing.assert_array_equal(b["weights"], np.tile([0.0] * 4 + [1.0] * 8, (4, 1)))
  np.testing.assert_array_equal(b["positions"], np.tile(np.arange(12), (4, 1)))


def test_batches_are_a_function_of_seed_and_step_and_rows():
  a = batches()
  for step in (7, 0):
    for key in KEYS:
      np.testing.assert_array_equal(a(step)[key], batches()(step)[key])
      np.testing.assert_array_equal(a(step)[key][1:3], a(step, slice(1, 3))[key])
  assert (a(0)["tokens"] != batches(seed=4)(0)["tokens"]).any()


def test_an_epoch_visits_every_sequence_once_in_its_own_order():
  a = batches()
  epochs = [np.concatenate([a(5 * e + i)["targets"] for i in range(5)]) for e in range(2)]
  expected = posgen.examples(block(train_sequences=20), "train", 12)[:, 1:]
  for epoch in epochs:
    np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(expected, axis=0))
  assert (epochs[0] != epochs[1]).any()


def test_fingerprints_tell_data_apart():
  prints = [
    posgen.Sequences(block(**options), 12).fingerprint
    for options in ({}, {}, dict(task="cot"), dict(mode="combinations"), dict(seed=1))
  ]
  assert prints[0] == prints[1] and len(set(prints)) == 4


# ---- Predictions.


def test_predictions_on_a_mesh_are_the_argmax_of_all_logits():
  m = tiny.model(vocab_size=64, num_layers=1, attention="dense")
  v, tokens = tiny.variables(m), tiny.tokens(batch=4, length=32)
  hidden = jax.jit(m.apply)(v, tokens, tiny.base_rope())
  expected = np.argmax(hidden @ unembedding(v["params"]), -1)
  assert len(np.unique(expected)) > 20
  predict = step_lib.token_predictions(m, chunk=5)
  np.testing.assert_array_equal(predict(v, tokens, tiny.base_rope()), expected)
  mesh = tiny.mesh(fsdp=2, context=2, tensor=2)
  with jax.set_mesh(mesh):
    placed = jax.device_put(v, sharding.shardings(mesh, v))
    batch = jax.device_put(tokens, sharding.batch_sharding(mesh, rows=4))
    np.testing.assert_array_equal(predict(placed, batch, tiny.base_rope()), expected)
  assert step_lib.token_predictions(m, chunk=5) is predict  # compiled once


@pytest.mark.parametrize("tensor", [1, 2])
def test_of_equal_logits_the_first_is_predicted(tensor):
  matrix = np.zeros((3, 8), np.float32)
  matrix[0, [2, 6]], matrix[1, [5, 7]] = 1, 1  # in both halves; in the second alone
  hidden = np.eye(3, dtype=np.float32)[None]
  with jax.set_mesh(tiny.mesh(tensor=tensor)):
    found = jax.jit(lambda h, m: most_likely(h, m, 2))(hidden, matrix)
  assert found.tolist() == [[2, 5, 0]]


# ---- Accuracy.


def small(**train):
  """A config that trains on PosGen in seconds."""
  c = load(ROOT / "configs" / "posgen.py", "task=cot,scaling=yarn,yarn=test_only,runlocal")
  c.model.update(num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=32)
  c.model.attention = "dense"
  c.data.length = c.rope.original_context = 16
  c.rope.context = 32
  c.data.posgen.update(train_sequences=40, held_out=20)
  c.train.update(steps=2, batch_size=4, warmup_steps=0, log_every=1)
  c.train.update(train)
  c.evals.posgen.update(length=32, num_samples=10, every_tokens=8, batch_size=4)
  return c


def accuracy(predictions, **options):
  c = small()
  c.data.posgen.task = "semi_recursive"
  c.evals.posgen.update(options)
  return evaluate(c.evals.posgen, Subject(c, None, None, predictions=predictions))


def oracle(tokens, seq_len):
  """What follows is the sequence itself, which its seed tells."""
  assert tokens.shape[1] == seq_len and (tokens[:, 0] == 21).all()
  x = posgen.sequences("semi_recursive", tokens[:, 1:5], seq_len, modulus=17, far=1)
  np.testing.assert_array_equal(x[:, :-1], tokens[:, 1:])
  return x


def test_a_perfect_model_has_accuracy_1_at_every_place():
  inside, outside = accuracy(oracle).values()
  assert (inside["accuracy"], inside["stderr"], inside["start"], inside["end"]) == (1, 0, 4, 16)
  assert (outside["accuracy"], outside["start"], outside["end"]) == (1, 16, 32)
  assert (inside["tokens"], inside["samples"]) == (12 * 10, 10)
  places = [(part["start"], part["end"]) for part in outside["by_position"]]
  assert places == [(4, 8), (8, 16), (16, 24), (24, 32)]
  assert all(part["accuracy"] == 1 for part in outside["by_position"])


def test_a_faulty_model_has_the_accuracy_and_error_of_its_faults():
  def faulty(tokens, seq_len):
    x = oracle(tokens, seq_len)
    x[:, 24:] += 1  # never right from token 24 on,
    odd = tokens[:, 1] % 2 == 1
    x[odd, 4:10] += 1  # nor, in some sequences, at first
    return x

  inside, outside = accuracy(faulty).values()
  rows = posgen.seeds(small().data.posgen, "test")[:10]
  by_sequence = np.where(rows[:, 0] % 2 == 1, 0.5, 1.0)
  assert inside["accuracy"] == pytest.approx(by_sequence.mean())
  assert inside["stderr"] == pytest.approx(by_sequence.std(ddof=1) / math.sqrt(10))
  assert inside["stderr"] > 0 and (outside["accuracy"], outside["stderr"]) == (0.5, 0)
  assert [p["accuracy"] for p in outside["by_position"]][2:] == [1, 0]


def test_a_model_without_far_tokens_reaches_half_and_a_seventeenth_of_the_rest():
  def near(tokens, seq_len):
    return (2 * tokens - np.pad(tokens, ((0, 0), (3, 0)))[:, :-3]) % 17

  options = dict(num_samples=1000, length=256, batch_size=500)
  c = small()
  c.data.posgen.update(task="semi_recursive", held_out=1000)
  c.rope.context = 256
  c.evals.posgen.update(options)
  r = evaluate(c.evals.posgen, Subject(c, None, None, predictions=near))["out of distribution"]
  assert r["accuracy"] == pytest.approx(0.5 + 0.5 / 17, abs=5 * r["stderr"])
  assert r["stderr"] < 0.001


def test_groups_change_nothing_and_splits_do():
  def some_errors(tokens, seq_len):
    return np.where(tokens % 3 == 0, 0, oracle(tokens, seq_len))

  assert accuracy(some_errors, batch_size=4) == accuracy(some_errors, batch_size=10)
  assert accuracy(some_errors, split="val") != accuracy(some_errors)


def test_sequences_no_longer_than_in_training_have_no_column_beyond():
  (column,) = accuracy(oracle, length=16)
  assert column == "in distribution"


# ---- On the screen.


def test_the_curve_by_position_is_printed_where_a_result_asks_for_it():
  result = accuracy(oracle)
  printed = report.table({"": dict(posgen=result)})
  assert "posgen: accuracy by position" in printed and "tokens 4 .. 7" in printed
  both = report.table(dict(a=dict(posgen=result), b=dict(posgen=accuracy(oracle, every_tokens=16))))
  curve = both.split("\n\n")[1].splitlines()
  assert curve[0].split()[-2:] == ["a", "b"] and len(curve) == 2 + 6
  del result["out of distribution"]["show"]
  assert "by position" not in report.table({"": dict(posgen=result)})


# ---- Settings.


def posgen_config(arg):
  return load(ROOT / "configs" / "posgen.py", arg)


def test_the_config_is_the_paper_and_its_arguments_the_release():
  c = posgen_config("task=recursive,scaling=yarn,resonance=True")
  t, p, m = c.train, c.data.posgen, c.model
  assert (p.task, p.mode, c.rope.resonance, resolve.factor(c)) == ("recursive", "disjoint", True, 4)
  assert (t.steps, t.batch_size, t.learning_rate, t.weight_decay) == (11_850, 128, 2e-4, 0.01)
  assert (m.num_layers, m.d_model, m.num_heads, m.head_dim) == (2, 512, 8, 64)
  relu, swiglu = 2 * 512 * 2048, 3 * 512 * m.d_ff
  assert swiglu == pytest.approx(relu, rel=1e-3)
  assert resolve.training_rope(c).inv_freq.tolist() == resolve.rope(c).inv_freq.tolist()
  c = posgen_config("scaling=yarn,yarn=test_only,mode=combinations,layers=6,yarn_length=257")
  assert (c.data.posgen.mode, c.model.num_layers) == ("combinations", 6)
  plain = rope.base(head_dim=64, theta=1e4, original_context=64)
  assert resolve.training_rope(c).inv_freq.tolist() == plain.inv_freq.tolist()
  factors = plain.inv_freq / resolve.rope(c).inv_freq
  assert (factors[:11] == 1).all() and 1 < factors[11] < factors[12] < 4
  np.testing.assert_allclose(factors[13:], 4)  # the released ramp, from pair 10 to pair 13
  for arg in ("scaling=yarn,yarn=later", "yarn=test_only", "scaling=pi,yarn_length=257"):
    with pytest.raises(ValueError, match="config argument yarn"):
      posgen_config(arg)


def test_unscaled_training_keeps_resonance_and_is_unscaled():
  c = posgen_config("scaling=yarn,yarn=test_only,resonance=True")
  same = posgen_config("scaling=none,resonance=True")
  r = resolve.training_rope(c)
  assert r.inv_freq.tolist() == resolve.rope(same).inv_freq.tolist() and r.period is not None
  assert resolve.describe(c, r=r)["scaling"] == "none" and resolve.describe(c)["scaling"] == "yarn"
  assert "yarn x4 in evaluations only, resonance" in report.rope_line(c)


def test_a_run_is_trained_unscaled_and_evaluated_scaled(tmp_path, monkeypatch):
  c, seen = small(), []

  def recording(make, kind):
    def made(*args, **options):
      function = make(*args, **options)

      def call(*inputs):
        seen.append((kind, inputs[-1].inv_freq.tolist()))
        return function(*inputs)

      call.lower = function.lower
      return call

    return made

  for kind in ("train_step", "token_predictions"):
    monkeypatch.setattr(step_lib, kind, recording(getattr(step_lib, kind), kind))
  results = loop.train(c, str(tmp_path))
  base, scaled = resolve.base(c).inv_freq.tolist(), resolve.rope(c).inv_freq.tolist()
  assert base != scaled
  assert seen == [("train_step", base)] * 2 + [("token_predictions", scaled)] * 3
  assert json.loads((tmp_path / "rope.json").read_text())["inv_freq"] == base
  assert loop.evaluate(c, str(tmp_path)) == results
  assert len(results["posgen"]["out of distribution"]["by_position"]) == 4
  c.data.posgen.task = "recursive"
  with pytest.raises(ValueError, match="config.data.posgen.task='recursive'.*'cot'"):
    loop.train(c, str(tmp_path))


def test_what_was_trained_unscaled_may_be_scaled_otherwise(tmp_path):
  config.write(small(), str(tmp_path / "run"))
  c = small(rope="scaled")
  c.init_from = str(tmp_path / "run")
  c.rope.scaling = "pi"
  state.check_init(c, str(tmp_path))
  config.write(small(rope="scaled"), str(tmp_path / "run"))
  with pytest.raises(ValueError, match="config.rope.scaling='pi'.*'yarn'"):
    state.check_init(c, str(tmp_path))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"data.posgen.task": "chain"}, "data.posgen.task='chain'.*'cot'"),
    ({"data.posgen.mode": "all"}, "data.posgen.mode='all'"),
    ({"data.posgen.modulus": 1}, "data.posgen.modulus=1"),
    ({"data.posgen.modulus": 60}, "data.posgen.modulus=60.*12,960,000"),
    ({"data.posgen.far": 0}, "data.posgen.far=0"),
    ({"data.posgen.train_sequences": 83_482}, "data.posgen.train_sequences=83482.*83,521"),
    ({"data.posgen.mode": "combinations", "data.posgen.seed": 1}, "data.posgen.seed=1"),
    ({"data.posgen.mode": "combinations", "data.posgen.modulus": 3}, "data.posgen.modulus=3"),
    ({"data.source": "stdlib"}, "tokenizer='posgen'"),
    ({"data.source": "stdlib", "tokenizer": "byte"}, "data.posgen.held_out=20.*source='stdlib'"),
    ({"tokenizer": "byte"}, "tokenizer='byte'.*'posgen'"),
    ({"data.packing": "pack"}, "data.packing='pack'"),
    ({"data.append_eos": True}, "data.append_eos=True"),
    ({"data.min_tokens": 3}, "data.min_tokens=3"),
    ({"data.length": 4}, "data.length=4.*above"),
    ({"data.positions": "pose", "train.rope": "scaled"}, "data.positions='pose'"),
    ({"data.positions": "randomised"}, "train.rope='unscaled'.*'randomised'"),
    ({"train.rope": "both"}, "train.rope='both'"),
    ({"rope.scaling": "none", "rope.yarn.beta_fast": 32.0, "rope.yarn.beta_slow": 1.0},
     "train.rope='unscaled'.*scales nothing"),
    ({"evals.posgen.split": "train"}, "evals.posgen.split='train'"),
    ({"evals.posgen.length": 33}, "evals.posgen.length=33.*context=32"),
    ({"evals.posgen.num_samples": 21}, "evals.posgen.num_samples=21.*held_out=20"),
    ({"evals.posgen.every_tokens": 0}, "evals.posgen.every_tokens=0"),
  ],
  ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_bad_settings_are_refused_by_key(changes, message):
  c = small()
  for key, value in changes.items():
    target = c
    *parents, leaf = key.split(".")
    for parent in parents:
      target = target[parent]
    target[leaf] = value
  with pytest.raises(ValueError, match=f"config.{message}"):
    validate.validate(c)


def test_evaluations_and_data_must_both_be_posgen():
  c = small()
  c.evals.perplexity = config.perplexity(lengths=(16,), stride=16)
  with pytest.raises(ValueError, match="evals.perplexity.type='perplexity'.*'posgen'"):
    validate.validate(c)
  c = config.base()
  c.tokenizer = "byte"
  c.evals.posgen = config.posgen()
  with pytest.raises(ValueError, match="evals.posgen.type='posgen'.*source='stdlib'"):
    validate.validate(c)
