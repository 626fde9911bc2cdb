"""One step on any mesh is the step on one device; what does not fit is refused with its numbers."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from rope_jax import config, rope
from rope_jax.data.arrange import Arrange, _halves, _on_host
from rope_jax.train import sharding
from rope_jax.train import step as step_lib

SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
ADAPTED = dict(
  lora_rank=4,
  lora_targets=("q", "k", "v", "o", "gate", "up", "down"),
  phase="psc",
  vocab_size=64,
  num_layers=2,
  remat="attention",
)
MESHES = [
  dict(fsdp=2, data=2, context=2),
  dict(fsdp=2, context=4),
  dict(context=4, tensor=2),
  dict(data=8),
  dict(fsdp=2, context=2, tensor=2),
]


def batch(rows=8, length=32, seed=0):
  """Packed documents, of which some tokens have no weight."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, 61, (rows, length + 1)).astype(np.int32)
  segments = np.cumsum(rng.random((rows, length)) < 0.1, axis=1).astype(np.int32)
  return dict(
    tokens=ids[:, :-1],
    targets=ids[:, 1:],
    positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    segment_ids=segments,
    weights=(rng.random((rows, length)) < 0.8).astype(np.float32),
  )


def put(mesh, b):
  shape = b["tokens"].shape
  return sharding.put_batch(
    lambda rows: {k: x[rows] for k, x in b.items()}, shape, sharding.batch_sharding(mesh)
  )


def steps(mesh, m, *, trainable=("params", "lora", "phase"), accumulation=1, n=1, tx=SGD, chunk=8):
  """Parameters and metrics after n steps from random variables, and the jitted step."""
  v = tiny.variables(m)
  with jax.set_mesh(mesh):
    placed = jax.device_put(v, sharding.shardings(mesh, v))
    train = {k: placed[k] for k in trainable}
    frozen = {k: x for k, x in placed.items() if k not in train}
    placement = sharding.shardings(mesh, jax.eval_shape(tx.init, train))
    opt_state = jax.jit(tx.init, out_shardings=placement)(train)
    before = jax.tree.map(lambda x: x.sharding, (train, opt_state))
    step = step_lib.train_step(m, tx, accumulation=accumulation, chunk=chunk, placement=before)
    b = put(mesh, batch())
    for _ in range(n):
      train, opt_state, metrics = step(train, opt_state, frozen, b, tiny.base_rope())
  after = jax.tree.map(lambda x: x.sharding, (train, opt_state))
  same = jax.tree.map(
    lambda x, a, b: a.is_equivalent_to(b, x.ndim), (train, opt_state), before, after
  )
  assert jax.tree.all(same), "a step moves its state"
  return jax.tree.map(np.asarray, (train, metrics)), step


@functools.cache
def one_device(m):
  return steps(tiny.mesh(), m)[0]


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_step_on_any_mesh_is_the_step_on_one_device(mesh, strategy):
  m = tiny.model(**ADAPTED, context_parallel=strategy)
  got, step = steps(tiny.mesh(**mesh), m)
  # SGD at 0.1: parameters differ by a tenth of what their gradients differ by.
  assert_close(got, one_device(m), rtol=1e-5, atol=1e-6)
  assert step._cache_size() == 1


def test_a_mesh_does_not_change_a_step_with_accumulation_and_a_frozen_base():
  m = tiny.model(**ADAPTED)
  options = dict(trainable=("lora", "phase"), accumulation=2, n=3, tx=optax.adam(1e-3), chunk=5)
  expected, _ = steps(tiny.mesh(), m, **options)
  got, step = steps(tiny.mesh(fsdp=2, context=2, tensor=2), m, **options)
  assert_close(got, expected, rtol=1e-4, atol=1e-5)
  assert step._cache_size() == 1


def test_parameters_and_optimizer_state_are_split_over_all_axes_but_data():
  m, mesh = tiny.model(**ADAPTED), tiny.mesh(fsdp=2, context=2, tensor=2)
  v = tiny.variables(m)
  state = dict(v, opt=optax.adam(1e-3).init({k: v[k] for k in ("lora", "phase")}))
  split = sharding.shardings(mesh, state)
  parts = jax.tree.map(
    lambda x, s: x.size // np.prod(s.shard_shape(x.shape), dtype=int), state, split
  )
  attention = parts["params"]["layers"]["attention"]
  assert {attention[k] for k in "qkvo"} == {8}
  assert {parts["params"]["layers"]["mlp"][k] for k in ("gate", "up", "down")} == {8}
  assert parts["params"]["embedding"] == parts["params"]["lm_head"] == 8
  assert attention["v"] == 8 and parts["phase"]["layers"]["attention"]["psc_k"]["up"] == 8
  moments = parts["opt"][0].mu
  assert moments["phase"] == parts["phase"] and moments["lora"] == parts["lora"]
  assert parts["lora"]["layers"]["attention"]["q"] == dict(a=4, b=2)


def test_every_process_makes_only_the_rows_of_its_devices():
  mesh, made = tiny.mesh(data=2, fsdp=2, context=2), []

  def make(rows):
    made.append((rows.start, rows.stop))
    return dict(tokens=np.arange(8 * 6).reshape(8, 6)[rows])

  out = sharding.put_batch(make, (8, 6), sharding.batch_sharding(mesh))
  np.testing.assert_array_equal(out["tokens"], np.arange(48).reshape(8, 6))
  assert sorted(made) == [(0, 2), (2, 4), (4, 6), (6, 8)]  # each once, for both of its devices


def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers():
  mesh = config.base().mesh
  mesh.fsdp = 3
  with pytest.raises(ValueError, match="fsdp=3 x context=1 x tensor=1 does not divide the 8 dev"):
    sharding.make_mesh(mesh, 9)
  mesh.update(fsdp=4, data=4)
  with pytest.raises(ValueError, match="data=4 x fsdp=4 .* needs 16 devices, there are 8"):
    sharding.make_mesh(mesh, 16)
  mesh.update(fsdp=4, data=2)
  with pytest.raises(ValueError, match="batch_size.*6 sequences.*data=2 x fsdp=4"):
    sharding.make_mesh(mesh, 6)
  mesh.update(fsdp=3, data=-1, context=-1)
  with pytest.raises(ValueError, match="data=1 x fsdp=3 x tensor=1 does not divide the 8 devices"):
    sharding.make_mesh(mesh, 3)
  mesh.update(fsdp=8, data=-1, context=1)
  with pytest.raises(ValueError, match="fsdp=8 x context=1 does not divide dimension 12"):
    sharding.shardings(sharding.make_mesh(mesh, 8), dict(params=dict(embedding=np.zeros((5, 12)))))


@pytest.mark.parametrize(
  "sizes, rows, expected",
  [
    (dict(data=-1), 6, (2, 1, 1, 1)),  # no row is computed twice
    (dict(data=-1, fsdp=2), 8, (4, 2, 1, 1)),
    (dict(data=-1, fsdp=2, context=-1), 2, (1, 2, 4, 1)),
    (dict(data=2, context=-1, tensor=2), 2, (2, 1, 2, 2)),
    (dict(data=1, context=4), 1, (1, 1, 4, 1)),
    (dict(data=-1, context=-1, fsdp=2), 8, (1, 2, 4, 1)),
  ],
)
def test_what_is_left_of_the_devices_goes_to_the_axis_that_asks(sizes, rows, expected):
  mesh = config.base().mesh
  mesh.update(sizes)
  assert tuple(sharding.make_mesh(mesh, rows).shape.values()) == expected


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("num_kv_heads", 3, "config.mesh.tensor=2 does not divide config.model.num_kv_heads=3"),
    ("d_ff", 7, "config.mesh.tensor=2 does not divide config.model.d_ff=7"),
    ("vocab_size", 61, "config.mesh.tensor=2 does not divide config.model.vocab_size=61"),
  ],
)
def test_a_model_that_does_not_divide_is_refused_with_its_numbers(key, value, message):
  c = config.base()
  c.model[key] = value
  with pytest.raises(ValueError, match=message):
    sharding.check(c, tiny.mesh(tensor=2), [64])


def test_lengths_that_do_not_divide_are_refused_with_their_numbers():
  with pytest.raises(ValueError, match="config.mesh.context=4: 60 tokens.*8 equal chunks"):
    sharding.check(config.base(), tiny.mesh(context=4), [64, 60])


def test_an_axis_used_twice_is_refused():
  with pytest.raises(ValueError, match="a/b over an axis twice"):
    sharding.checked_spec(tiny.mesh(fsdp=2), "a/b", (4, 4), P("fsdp", ("fsdp", "context")))


def test_an_array_with_too_few_dimensions_is_refused():
  with pytest.raises(ValueError, match="2 entries for a"):
    sharding.checked_spec(tiny.mesh(fsdp=2), "a", (4,), P(None, "fsdp"))


def test_a_dimension_of_one_is_not_split():
  spec = sharding.checked_spec(tiny.mesh(tensor=2), "phase", (3, 1, 4), P(None, "tensor"))
  assert spec == P(None, None)


def ropes():
  """Every kind of rope and learned phase: (options of the model, rope, what the batch adds)."""
  base = tiny.base_rope()
  yarn = rope.yarn(base, 4.0)
  factors = tuple(np.linspace(1, 4, 8))
  fractions = np.random.default_rng(0).random((8, 32)).astype(np.float32)
  short = np.random.default_rng(0).random((8, 32)) < 0.5
  return dict(
    resonance=({}, rope.resonance(yarn), {}),
    layers=({}, rope.stack([base, rope.pi(base, 2.0)]), {}),
    heads=({}, rope.stack([base, yarn], axis="head"), {}),
    start_tokens=(
      {},
      rope.longrope(base, factor=4.0, long_factor=factors, start_tokens=5, seq_len=256),
      {},
    ),
    fractions=({}, rope.pi(base, 2.0), dict(fractions=fractions)),
    short=({}, dataclasses.replace(yarn, short=base), dict(short=short)),
    psc_rotation=(dict(phase="psc_rotation"), yarn, {}),
    psc_post=(dict(phase="psc", psc_calibration="post"), yarn, {}),
    psc_shared=(dict(phase="psc", psc_share="all"), yarn, {}),
  )


@pytest.mark.parametrize("kind", ropes())
def test_every_rope_and_phase_is_the_same_over_a_context(kind):
  """The tokens of a device are not neighbours, and their positions are those of the caller."""
  options, r, added = ropes()[kind]
  m = tiny.model(**(ADAPTED | dict(phase="none") | options), context_parallel="ring")
  # Weights of half the size: the gradient of a sharp softmax amplifies the last bit.
  v, b = jax.tree.map(lambda x: x / 2, tiny.variables(m)), batch() | added
  b["positions"] = b["positions"] * 2 + 3

  def loss(v, b, r):
    return step_lib.batch_loss(m, v, b, r, 8)

  expected, gradients = jax.jit(jax.value_and_grad(loss))(v, b, r)
  mesh = tiny.mesh(fsdp=2, context=2, tensor=2)
  with jax.set_mesh(mesh):
    placed = jax.device_put(v, sharding.shardings(mesh, v))
    got, got_gradients = jax.jit(jax.value_and_grad(loss))(placed, put(mesh, b), r)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  largest = max(float(abs(x).max()) for x in jax.tree.leaves(gradients))
  assert_close(got_gradients, gradients, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("rows", [4, 3])
def test_losses_of_an_evaluation_come_back_in_order(rows):
  """Without positions given, and with rows that the mesh does not divide."""
  m, tokens = tiny.model(**ADAPTED, context_parallel="ring"), tiny.tokens(rows, 32)
  v, r = tiny.variables(m), rope.yarn(tiny.base_rope(), 4.0)
  expected = step_lib.token_loss(m, chunk=8)(v, tokens, r)
  mesh = tiny.mesh(fsdp=2, context=4)
  with jax.set_mesh(mesh):
    placed = jax.device_put(v, sharding.shardings(mesh, v))
    placed_tokens = jax.device_put(tokens, sharding.batch_sharding(mesh, rows))
    got = step_lib.token_loss(m, chunk=8)(placed, placed_tokens, r)
  assert got.is_fully_replicated
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_context_wider_than_a_head_leaves_the_phase_whole_on_it():
  phase = dict(phase=dict(layers=dict(psc_q=dict(up=np.zeros((2, 4, 4, 4))))))
  split = sharding.shardings(tiny.mesh(context=8), phase)["phase"]["layers"]["psc_q"]["up"]
  assert split.shard_shape((2, 4, 4, 4)) == (2, 4, 4, 4)
  split = sharding.shardings(tiny.mesh(context=4), phase)["phase"]["layers"]["psc_q"]["up"]
  assert split.shard_shape((2, 4, 4, 4)) == (2, 4, 4, 1)


def test_blocks_of_splash_are_checked_for_every_length():
  c = config.base()
  c.model.update(attention="splash", context_parallel="ring", block_q=1024)
  sharding.check(c, tiny.mesh(context=2), [4096])
  with pytest.raises(ValueError, match="config.model.block_q=1024: .* 512 tokens"):
    sharding.check(c, tiny.mesh(context=2), [4096, 1024])


def test_positions_are_drawn_on_one_device_of_the_host_inside_a_mesh():
  """The mesh is at work; and with several processes all would have to take part."""
  sizes = dict(seed=0, length=16, context=64, original_context=16)
  alone = Arrange("randomised", **sizes)
  with jax.set_mesh(tiny.mesh(data=8)):
    inside = Arrange("randomised", **sizes)
    with _on_host():
      drawn = inside._draw(inside._key, _halves(np.arange(3)))
  assert len(inside._key.sharding.device_set) == 1
  assert {len(x.sharding.device_set) for x in drawn} == {1}
  np.testing.assert_array_equal(drawn[0], alone._draw(alone._key, _halves(np.arange(3)))[0])
