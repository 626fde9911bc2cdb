import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rope_jax import config, presets, resolve, rope
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train import flops, state
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


def test_marks_of_short_segments_reach_the_loss():
  m, b = tiny.model(), batch()
  v, base = tiny.variables(m), tiny.base_rope()
  yarn = rope.yarn(base, 4.0)
  both = dataclasses.replace(yarn, short=base)
  loss = jax.jit(lambda b, r: step_lib.batch_loss(m, v, b, r, 16))
  for mark, expected in ((True, base), (False, yarn)):
    marked = dict(b, short=np.full(b["tokens"].shape, mark))
    np.testing.assert_allclose(loss(marked, both), loss(b, expected), rtol=1e-6)


def test_weight_decay_spares_norms_and_biases():
  c = config.base()
  c.train.update(weight_decay=0.1, clip=0.0)
  params = {name: jnp.ones((2, 2)) for name in ("q", "q_bias", "down_bias", "scale")}
  tx = optimizer(c.train)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert {name for name, u in updates.items() if u.any()} == {"q"}
