import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rope_jax import config, presets, resolve, rope
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train import flops, loop, sharding, state
from rope_jax.train import step as step_lib
from rope_jax.train.optimizer import optimizer, schedule


def batch(rows=8, length=24, seed=0):
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, 61, (rows, length + 1)).astype(np.int32)
  return dict(
    tokens=ids[:, :-1],
    targets=ids[:, 1:],
    positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    segment_ids=np.zeros((rows, length), np.int32),
    weights=(rng.random((rows, length)) < 0.8).astype(np.float32),
  )


SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))


def take_step(m, v, b, *, trainable=("params", "lora", "phase"), accumulation=1, steps=1, tx=SGD):
  train = {k: jax.tree.map(jnp.array, v[k]) for k in trainable if k in v}
  frozen = {k: x for k, x in v.items() if k not in train}
  f = step_lib.train_step(m, tx, accumulation=accumulation, chunk=16)
  opt_state = tx.init(train)
  for _ in range(steps):
    train, opt_state, metrics = f(train, opt_state, frozen, b, tiny.base_rope())
  return {**frozen, **train}, metrics


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


ADAPTED = dict(lora_rank=4, phase="psc")


def test_the_loss_is_the_mean_over_weighted_tokens():
  m, b = tiny.model(), batch()
  v = tiny.variables(m)
  _, metrics = take_step(m, v, b)
  logits = jax.jit(m.apply)(v, b["tokens"], tiny.base_rope()) @ v["params"]["lm_head"]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, b["targets"])
  expected = (losses * b["weights"]).sum() / b["weights"].sum()
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  assert metrics["tokens"] == b["weights"].sum()


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_whole_batch(accumulation):
  m, b = tiny.model(**ADAPTED), batch()
  v = tiny.variables(m)
  whole, metrics = take_step(m, v, b)
  parts, part_metrics = take_step(m, v, b, accumulation=accumulation)
  assert_close(whole, parts, rtol=1e-4, atol=1e-6)
  assert_close(metrics, part_metrics, rtol=1e-5)


def test_frozen_parameters_do_not_move_by_one_bit_and_adapters_do():
  m = tiny.model(**ADAPTED)
  v = {k: jax.tree.map(np.asarray, x) for k, x in tiny.initial(m).items()}
  after, _ = take_step(m, v, batch(), trainable=("lora", "phase"), steps=3, tx=optax.adam(1e-2))
  jax.tree.map(np.testing.assert_array_equal, v["params"], after["params"])
  for name in ("lora", "phase"):  # after a step, B and U are not zero, so A and D move, too
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), v[name], after[name])
    assert all(jax.tree.leaves(moved)), (name, moved)


def test_no_gradient_of_a_frozen_matrix_is_computed():
  m, b = tiny.model(**ADAPTED, num_layers=1), batch()
  v = tiny.variables(m)

  def products(trainable):
    def loss(train):
      variables = {**v, **train}
      return step_lib.batch_loss(m, variables, b, tiny.base_rope(), 16)

    text = jax.jit(jax.grad(loss)).lower({k: v[k] for k in trainable}).compile().as_text()
    return text.count(" dot(") + text.count("custom-call") + text.count("ynn")

  assert products(("lora", "phase")) < products(("params", "lora", "phase"))


@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4), (1, 8)])
def test_a_sharded_step_equals_the_unsharded_step(mesh_shape):
  m = tiny.model(**ADAPTED, vocab_size=64, d_model=32, head_dim=16, num_layers=2)
  v, b = tiny.variables(m), batch()
  expected, metrics = take_step(m, v, b)
  mesh = jax.make_mesh(mesh_shape, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
  placed = jax.device_put(v, sharding.shardings(mesh, v))
  rows = sharding.put_rows(
    lambda part: {k: x[part] for k, x in b.items()}, 8, sharding.batch_sharding(mesh)
  )
  np.testing.assert_array_equal(rows["tokens"], b["tokens"])
  got, got_metrics = take_step(m, placed, rows)
  assert_close(expected, got, rtol=1e-4, atol=1e-5)
  assert_close(metrics, got_metrics, rtol=1e-5)
  if mesh_shape[1] > 1:
    q = placed["params"]["layers"]["attention"]["q"]
    assert q.addressable_shards[0].data.size == q.size // mesh_shape[1]


def test_a_mesh_that_does_not_fit_is_refused_by_key():
  mesh = config.base().mesh
  mesh.fsdp = 3
  with pytest.raises(ValueError, match="config.mesh.fsdp=3.*8 devices"):
    sharding.make_mesh(mesh, 8)
  mesh.update(fsdp=4, data=4)
  with pytest.raises(ValueError, match="needs 16 devices"):
    sharding.make_mesh(mesh, 16)
  mesh.update(fsdp=4, data=2)
  with pytest.raises(ValueError, match="batch_size.*6 sequences"):
    sharding.make_mesh(mesh, 6)
  mesh.update(fsdp=1, data=-1)
  assert sharding.make_mesh(mesh, 6).shape == {"data": 2, "fsdp": 1}
  mesh.update(fsdp=8)
  with pytest.raises(ValueError, match="config.mesh.fsdp=8 does not divide dimension 12"):
    sharding.shardings(sharding.make_mesh(mesh, 8), dict(params=dict(embedding=np.zeros((5, 12)))))


@pytest.mark.parametrize(
  "name, expected",
  [
    ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
    ("linear", [0.0, 0.5, 1.0, 0.6, 0.2]),
    ("cosine", [0.0, 0.5, 1.0, 0.6, 0.2]),
  ],
)
def test_schedules_warm_up_and_end_where_they_should(name, expected):
  t = config.base().train
  t.update(schedule=name, steps=12, warmup_steps=2, learning_rate=1.0)
  t.final_learning_rate = 0.2
  got = [float(schedule(t)(step)) for step in (0, 1, 2, 7, 12)]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_weight_decay_spares_norms():
  t = config.base().train
  t.update(steps=1, weight_decay=0.5, learning_rate=0.1)
  params = dict(params=dict(q=jnp.ones((2, 2)), norm=dict(scale=jnp.ones(2))))
  tx = optimizer(t)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zero, tx.init(params), params)
  np.testing.assert_allclose(updates["params"]["q"], -0.05, rtol=1e-6)
  assert not updates["params"]["norm"]["scale"].any()


def test_clipping_bounds_the_update_and_can_be_off():
  t = config.base().train
  t.update(steps=1)
  big = dict(q=jnp.full((2, 2), 1e3))
  for clip, chained in ((1.0, True), (0.0, False)):
    t.clip = clip
    assert (len(optimizer(t).init(big)) == 2) == chained


def test_train_flops_are_six_a_parameter_and_a_token():
  m = from_config(config.base())
  base = flops.train_flops_per_token(m, 0, 0, base_is_trained=True)
  params = tiny.initial(Llama(m))["params"]
  matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 2) + params["embedding"].size
  assert base == 6 * matrices
  assert flops.train_flops_per_token(m, 0, 10, base_is_trained=False) == 4 * matrices + 60
  attention = flops.train_flops_per_token(m, 100, 0, base_is_trained=True) - base
  assert attention == m.num_layers * 3 * 2 * 2 * (100 // 2) * m.num_heads * m.head_dim


# ---- Whole runs.


def final_state(workdir, c):
  mesh = sharding.make_mesh(c.mesh, c.train.batch_size)
  return jax.tree.map(np.asarray, state.run_variables(str(workdir), mesh))


def rows_of(workdir):
  with open(os.path.join(workdir, "metrics.jsonl")) as f:
    rows = [json.loads(line) for line in f]
  for row in rows:  # times differ, nothing else may
    row.pop("tokens_per_second", None)
  return rows


def adapted_config(folder):
  c = tiny.run_config(folder)
  c.lora.rank = 4
  c.rope.phase = "psc"
  c.rope.scaling = "yarn"
  c.rope.original_context = 16
  c.train.trainable = "adapters"
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.text_folder(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("make", [tiny.run_config, adapted_config])
def test_resume_is_bitwise(tmp_path, folder, make, monkeypatch):
  c = make(folder)
  whole = loop.train(c, str(tmp_path / "whole"))

  class Killed(BaseException):
    pass

  calls = []
  real = step_lib.train_step

  def dying(*args, **kwargs):
    step = real(*args, **kwargs)

    def call(*inputs):
      calls.append(1)
      if len(calls) == 6:
        raise Killed
      return step(*inputs)

    return call

  with monkeypatch.context() as patch:
    patch.setattr(step_lib, "train_step", dying)
    with pytest.raises(Killed):
      loop.train(c, str(tmp_path / "cut"))
  resumed = loop.train(c, str(tmp_path / "cut"))
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(tmp_path / "whole", c),
    final_state(tmp_path / "cut", c),
  )
  assert resumed == whole
  assert (tmp_path / "whole/results.json").read_text() == (
    tmp_path / "cut/results.json"
  ).read_text()
  assert [r for r in rows_of(tmp_path / "whole") if "loss" in r] == [
    r for r in rows_of(tmp_path / "cut") if "loss" in r
  ]


def test_training_learns_and_is_evaluated_as_by_eval(tmp_path, folder):
  c = tiny.run_config(folder, steps=60, log_every=10)
  untrained = loop.evaluate(c, str(tmp_path / "none"))
  results = loop.train(c, str(tmp_path / "run"))
  losses = [r["loss"] for r in rows_of(tmp_path / "run") if "loss" in r]
  assert losses[-1] < 0.7 * losses[0]
  assert results["perplexity"]["64"]["ppl"] < 0.5 * untrained["perplexity"]["64"]["ppl"]
  assert untrained["perplexity"]["64"]["ppl"] == pytest.approx(256, rel=0.1)
  assert loop.evaluate(c, str(tmp_path / "run")) == results
  assert json.loads((tmp_path / "run/results.json").read_text()) == results
  rope = json.loads((tmp_path / "run/rope.json").read_text())
  assert rope["inv_freq"] == resolve.rope(c).inv_freq.tolist()
  assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_evaluations_run_during_training_when_due(tmp_path, folder):
  c = tiny.run_config(folder, steps=5)
  c.evals.perplexity.every = 2
  c.checkpoint.every = 2
  loop.train(c, str(tmp_path))
  rows = rows_of(tmp_path)
  assert [r["step"] for r in rows if "perplexity/64/ppl" in r] == [2, 4, 5]
  loop.train(c, str(tmp_path))  # a finished run, started again, adds nothing
  assert rows_of(tmp_path) == rows


def test_a_kill_between_checkpoint_and_evaluation_loses_no_row(tmp_path, folder, monkeypatch):
  c = tiny.run_config(folder, steps=4)
  c.checkpoint.every = c.evals.perplexity.every = 2

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(loop.evals, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
      loop.train(c, str(tmp_path))
  loop.train(c, str(tmp_path))
  assert [r["step"] for r in rows_of(tmp_path) if "perplexity/64/ppl" in r] == [2, 4]
  assert [r["step"] for r in rows_of(tmp_path) if "loss" in r] == [1, 2, 3, 4]


def test_a_run_starts_from_another_run(tmp_path, folder):
  loop.train(tiny.run_config(folder), str(tmp_path / "base"))
  c = adapted_config(folder)
  c.init_from = "run:base"
  loop.train(c, str(tmp_path / "adapted"))
  base = final_state(tmp_path / "base", c)["params"]
  jax.tree.map(np.testing.assert_array_equal, base, final_state(tmp_path / "adapted", c)["params"])
  c.init_from = str(tmp_path / "adapted")
  c.lora.rank, c.rope.phase, c.train.trainable = 0, "none", "all"
  with pytest.raises(ValueError, match="config.lora.rank=0.*has 4"):
    loop.train(c, str(tmp_path / "third"))


def test_a_workdir_with_another_run_is_refused_by_key(tmp_path, folder):
  c = tiny.run_config(folder)
  config.write(c, str(tmp_path))
  c.evals.perplexity.num_samples = 1  # evaluations may change
  config.check_workdir(c, str(tmp_path))
  c.train.learning_rate = 1.0
  with pytest.raises(ValueError, match="config.train.learning_rate=1.0 .was 0.003"):
    loop.train(c, str(tmp_path))


def test_a_mistake_found_before_the_first_step_does_not_claim_the_workdir(tmp_path, folder):
  c = tiny.run_config(folder)
  for block, key, wrong, message in (
    ("model", "vocab_size", 100, "vocab_size=100"),
    ("mesh", "fsdp", 3, "mesh.fsdp=3"),
    ("data", "min_tokens", 10**6, "min_tokens=1000000"),
  ):
    right, c[block][key] = c[block][key], wrong
    with pytest.raises(ValueError, match=message):
      loop.train(c, str(tmp_path / "run"))
    c[block][key] = right
  c.evals.perplexity.num_samples = 10**4
  with pytest.raises(ValueError, match="config.evals.perplexity: num_samples=10000"):
    loop.train(c, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_on_another_text(tmp_path):
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=1)
  loop.train(c, str(tmp_path / "run"))
  (tmp_path / "text" / "000.txt").write_text("changed " * 100)
  with pytest.raises(ValueError, match="other settings.*text rope_jax_text"):
    loop.train(c, str(tmp_path / "run"))


def test_a_trained_run_can_be_evaluated_beyond_its_context(tmp_path, folder):
  c = adapted_config(folder)
  c.train.steps = 1
  loop.train(c, str(tmp_path))
  c.rope.update(factor=8.0, context=128)
  c.evals.perplexity.lengths = (64, 128)
  assert set(loop.evaluate(c, str(tmp_path))["perplexity"]) == {"64", "128"}
  assert config.read(str(tmp_path)).rope.context == 64
  trained = json.loads((tmp_path / "rope.json").read_text())
  assert (trained["factor"], trained["context"]) == (4.0, 64)
  c.rope.theta = 5e5
  with pytest.raises(ValueError, match="config.rope.theta"):
    loop.evaluate(c, str(tmp_path))


def test_a_run_starts_only_from_weights_with_the_same_meaning(tmp_path, folder):
  loop.train(tiny.run_config(folder, steps=1), str(tmp_path / "base"))
  for key, value in (("rope.theta", 5e5), ("model.norm_eps", 1e-3)):
    c = tiny.run_config(folder, steps=1)
    c.init_from = "run:base"
    block, name = key.split(".")
    c[block][name] = value
    with pytest.raises(ValueError, match=f"config.{key}={value}"):
      loop.train(c, str(tmp_path / "next"))


def written(path, **rope_changes):
  """The config of a run, as it stands in its workdir."""
  c = tiny.run_config(tiny.text_folder(path.parent / "text"), steps=1)
  c.rope.update(rope_changes)
  config.write(c, str(path))
  return c


@pytest.mark.parametrize(
  "source, target, message",
  [
    (dict(partial_rotary_factor=0.5), dict(), "rope.partial_rotary_factor=1.0.*0.5"),
    (dict(scaling="drope"), dict(scaling="yarn", context=128), "rope.scaling='yarn'.*'drope'"),
    (dict(scaling="yarn", context=128), dict(scaling="pi", context=256), "rope.scaling='pi'"),
    (dict(scaling="yarn", context=128),
     dict(scaling="yarn", original_context=128, context=256), "rope.original_context=128.*64"),
    (dict(resonance=True), dict(), "rope.resonance=False.*True"),
    (dict(scaling="clex", context=128), dict(), "rope.scaling='none'.*'clex'"),
    (dict(scaling="clex", context=128),
     dict(scaling="clex", context=128, clex=dict(activation="silu")), "clex.activation='silu'"),
    (dict(phase="psc"), dict(phase="psc", psc=dict(share="all")), "rope.psc.share='all'.*'none'"),
    (dict(phase="psc"), dict(), "rope.phase='none'.*'psc'"),
    # Another factor of the same method is how extension goes on.
    (dict(scaling="yarn", context=128), dict(scaling="yarn", context=256), None),
    (dict(), dict(scaling="yarn", context=128), None),
    # Or the extended rope is declared the base.
    (dict(scaling="yarn", context=128),
     dict(base="checkpoint", scaling="pi", original_context=128, context=256), None),
  ],
)  # fmt: skip
def test_a_run_that_starts_from_a_run_keeps_the_rope_of_its_weights(
  tmp_path, source, target, message
):
  written(tmp_path / "base", **source)
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=1)
  c.rope.update(target)
  c.init_from = str(tmp_path / "base")
  if message is None:
    state.check_init(c, "")
    return
  with pytest.raises(ValueError, match=message):
    state.check_init(c, "")


def test_a_run_can_be_extended_from_the_rope_that_it_reached(tmp_path):
  first = written(tmp_path / "base", scaling="yarn", context=128)
  c = tiny.run_config(tiny.text_folder(tmp_path / "text"), steps=1)
  c.init_from = str(tmp_path / "base")
  c.rope.update(base="checkpoint", scaling="pi", original_context=128, context=256)
  own, r = resolve.rope(first), resolve.rope(c)
  np.testing.assert_allclose(r.inv_freq, own.inv_freq / 2)
  assert r.attention_scale == own.attention_scale > 1
  c.rope.original_context = 64
  with pytest.raises(ValueError, match="rope.original_context=64.*128"):
    resolve.rope(c)
  c.init_from = "run:base"
  with pytest.raises(ValueError, match="rope.base='checkpoint'.*workdir"):
    resolve.rope(c)


def test_factor_files_must_not_change_under_a_run(tmp_path, folder):
  def settings():
    c = tiny.run_config(folder, steps=1)
    c.rope.update(scaling="longrope", original_context=32)
    c.rope.longrope.factors = str(tmp_path / "f.csv")
    return c

  (tmp_path / "f.csv").write_text(",".join(["2.0"] * 8))
  facts = dict(factors=resolve.fingerprint(settings()))
  config.write(settings(), str(tmp_path / "run"), **facts)
  config.check_workdir(settings(), str(tmp_path / "run"), **facts)
  (tmp_path / "f.csv").write_text(",".join(["9.0"] * 8))
  for go_on in (loop.train, loop.evaluate):
    with pytest.raises(ValueError, match="other settings.*factors"):
      go_on(settings(), str(tmp_path / "run"))


def test_a_run_with_lists_for_each_layer_knows_itself_again(tmp_path, folder):
  c = tiny.run_config(folder, steps=1)
  c.rope.update(scaling="longrope", original_context=32)
  c.rope.longrope.long_factor = [[2.0] * 8, (3.0,) * 8]
  config.write(c, str(tmp_path))
  config.check_workdir(c, str(tmp_path))
  assert resolve.rope(config.read(str(tmp_path))).inv_freq.shape == (2, 8)


def test_a_method_of_a_notebook_is_missed_only_where_it_is_used(tmp_path, folder, monkeypatch):
  def mine(r, factor, *, power: float = 1.0):
    return r.apply("mine", r.inv_freq / factor**power, factor=factor)

  monkeypatch.setitem(rope.SCALINGS, "mine", mine)
  for name in ("none", "mine"):
    c = tiny.run_config(folder, steps=1)
    c.rope.update(scaling=name, original_context=32)
    config.write(c, str(tmp_path / name))
  monkeypatch.delitem(rope.SCALINGS, "mine")
  assert config.read(str(tmp_path / "none")).rope.scaling == "none"
  with pytest.raises(ValueError, match="'mine' is no method here"):
    config.read(str(tmp_path / "mine"))


@pytest.mark.parametrize("mesh_shape", [(2, 4), (1, 8)])
def test_a_sharded_step_keeps_its_shardings_and_compiles_once(mesh_shape):
  m = tiny.model(**ADAPTED, vocab_size=64, num_layers=2)
  mesh = jax.make_mesh(mesh_shape, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
  v, tx = tiny.variables(m), optax.adam(1e-3)
  train = jax.device_put(v, sharding.shardings(mesh, v))
  placement = sharding.shardings(mesh, jax.eval_shape(tx.init, train))
  opt_state = jax.jit(tx.init, out_shardings=placement)(train)
  before = jax.tree.map(lambda x: x.sharding, (train, opt_state))
  f = step_lib.train_step(m, tx, accumulation=1, chunk=16, placement=before)
  b = batch()
  rows = sharding.put_rows(
    lambda part: {k: x[part] for k, x in b.items()}, 8, sharding.batch_sharding(mesh)
  )
  for _ in range(2):
    train, opt_state, _ = f(train, opt_state, {}, rows, tiny.base_rope())
  after = jax.tree.map(lambda x: x.sharding, (train, opt_state))
  assert jax.tree.all(
    jax.tree.map(lambda x, a, b: a.is_equivalent_to(b, x.ndim), (train, opt_state), before, after)
  )
  assert f._cache_size() == 1


def test_a_config_survives_its_file(tmp_path, folder):
  c = adapted_config(folder)
  c.rope.factor = 3.0
  c.rope.yarn.mscale = c.rope.yarn.mscale_all_dim = 0.5
  config.write(c, str(tmp_path))
  assert config.read(str(tmp_path)).to_dict() == c.to_dict()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, folder):
  c = tiny.run_config(folder, learning_rate=1e30, clip=0.0)
  with pytest.raises(FloatingPointError, match=r"step \d: loss .*newest checkpoint"):
    loop.train(c, str(tmp_path))
  assert not [d for d in os.listdir(tmp_path / "checkpoints") if d.isdigit() and int(d) >= 6]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, folder, monkeypatch):
  c = tiny.run_config(folder)
  monkeypatch.setattr(ByteTokenizer, "vocab_size", 300)
  with pytest.raises(ValueError, match="config.model.vocab_size=256.*300"):
    loop.train(c, str(tmp_path))


def test_length_dependent_ropes_are_resolved_for_each_length(tmp_path, folder):
  c = tiny.run_config(folder, steps=0)
  c.rope.update(original_context=16, scaling="dynamic_ntk", factor=2.0)
  seen = {n: resolve.rope(c, n).inv_freq for n in (8, 16, 32, 64)}
  np.testing.assert_array_equal(seen[8], seen[16])
  assert (seen[32][1:] < seen[16][1:]).all() and (seen[64][1:] < seen[32][1:]).all()
  results = loop.evaluate(c, str(tmp_path))["perplexity"]
  assert set(results) == {"32", "64"} and math.isfinite(results["64"]["ppl"])


def test_the_psc_64k_step_traces_at_full_size():
  """Llama-2 7B, 65,536 tokens, global batch 16: shapes only, nothing is allocated."""
  c = presets.psc_experiment(None, context=65_536)
  m, rope, tx = Llama(from_config(c)), resolve.rope(c), optimizer(c.train)
  v = jax.eval_shape(lambda: m.init(jax.random.key(0), jnp.zeros((1, 8), int), rope))
  sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in v.items()}
  assert sizes == dict(params=6_738_415_616, lora=8_388_608, phase=67_108_864)
  trainable, frozen = state.split(c, v)
  assert set(trainable) == {"lora", "phase"} and {
    x.dtype for x in jax.tree.leaves(frozen["params"])
  } == {jnp.dtype("bfloat16")}
  step = step_lib.train_step(m, tx, accumulation=1, chunk=c.train.loss_chunk)
  b = {k: jax.ShapeDtypeStruct((16, 65_536), x.dtype) for k, x in batch().items()}
  after, opt_state, metrics = jax.eval_shape(
    step, trainable, jax.eval_shape(tx.init, trainable), frozen, b, rope
  )
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), trainable
  )
  assert metrics["loss"].dtype == jnp.float32
  moments = [x for x in jax.tree.leaves(opt_state) if x.shape]
  assert sum(x.size for x in moments) == 2 * (sizes["lora"] + sizes["phase"])


def test_fractions_of_positions_reach_the_loss():
  """At quarters of positions, the untouched rope is position interpolation by 4."""
  m, b = tiny.model(), batch()
  v = tiny.variables(m)
  loss = jax.jit(lambda b, r: step_lib.batch_loss(m, v, b, r, 16))
  p = b["positions"]
  quarters = dict(b, positions=p // 4, fractions=(p % 4 / 4).astype(np.float32))
  base = tiny.base_rope()
  np.testing.assert_allclose(loss(quarters, base), loss(b, rope.pi(base, 4.0)), rtol=1e-5)
  assert abs(loss(quarters, base) / loss(b, base) - 1) > 1e-3


POSITIONS = dict(
  mixed=dict(rope__scaling="yarn", rope__context=128, rope__original_context=32),
  clex=dict(data__length=64, rope__scaling="clex", rope__context=128),
)


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_arrangement_of_positions_trains(tmp_path, positions):
  """CLEX, whose frequencies differ from step to step, also resumes bit for bit."""
  folder = tiny.text_folder(tmp_path / "text")

  def settings():
    c = tiny.run_config(folder, steps=3)
    c.data.positions = positions
    for key, value in POSITIONS[positions].items():
      block, name = key.split("__")
      c[block][name] = value
    if positions == "clex":
      c.rope.clex.update(max_factor=2, time_step=0.25)
      c.train.trainable = "adapters"
    c.checkpoint.every = 2
    del c.evals.perplexity
    return c

  c = settings()
  loop.train(c, str(tmp_path / "whole"))
  mesh = sharding.make_mesh(c.mesh, 1)
  first, last = (
    state.initial_variables(c, mesh, ""),
    state.run_variables(str(tmp_path / "whole"), mesh),
  )
  trained = "phase" if positions == "clex" else "params"
  moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), last[trained], first[trained])
  assert any(jax.tree.leaves(moved))
  described = json.loads((tmp_path / "whole" / "rope.json").read_text())
  np.testing.assert_allclose(described["inv_freq"], resolve.training_rope(c).inv_freq)
  if positions != "clex":
    return
  jax.tree.map(np.testing.assert_array_equal, last["params"], first["params"])
  with pytest.MonkeyPatch.context() as m:
    m.setattr(loop.batches_lib, "prefetch", stopping(loop.batches_lib.prefetch, 2))
    with pytest.raises(KeyboardInterrupt):
      loop.train(settings(), str(tmp_path / "cut"))
  loop.train(settings(), str(tmp_path / "cut"))
  again = state.run_variables(str(tmp_path / "cut"), mesh)
  jax.tree.map(np.testing.assert_array_equal, last, again)


def stopping(prefetch, step):
  def stopped(make, start, stop):
    for i, batch in enumerate(prefetch(make, start, stop), start):
      if i == step:
        raise KeyboardInterrupt
      yield batch

  return stopped
