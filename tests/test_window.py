"""Sliding windows: the same keys in every kernel, over every mesh and from the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_attention import inputs, segments
from test_context import config_of, packed, run
from test_generate import NEW, PROMPTS, full_logits, generator, ropes

from rope_jax import config, validate
from rope_jax.model import attention, blockwise, cache, context, splash
from rope_jax.model.config import ModelConfig, from_config
from rope_jax.model.generate import Generator
from rope_jax.train import flops, sharding


def value_and_grad(f, q, k, v, weights):
  def loss(q, k, v):
    out = f(q, k, v)
    return (out * weights).sum(), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


def attend(window, ids=None, kernel="blockwise", **blocks):
  cfg = ModelConfig(**tiny.MODEL, attention=kernel, window=window, **blocks)
  return lambda q, k, v: attention.attend(cfg, q, k, v, ids)


@pytest.mark.parametrize("window", [1, 4, 9])
def test_dense_sees_the_last_tokens_and_itself(window):
  q, k, v, _ = (np.asarray(x, np.float64) for x in inputs(L=9))
  ids = np.asarray(segments(2, 9, seed=3))
  k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
  scores = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(8)
  i, j = np.mgrid[:9, :9]
  visible = (j <= i) & (j > i - window) & (ids[:, :, None] == ids[:, None, :])
  weights = np.where(visible[:, None], np.exp(scores), 0)
  expected = np.einsum("bhqk,bkhe->bqhe", weights / weights.sum(-1, keepdims=True), v)
  got = attend(window, jnp.asarray(ids), "dense")(*inputs(L=9)[:3])
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("blocks", [(16, 16), (8, 32), (24, 7)])
@pytest.mark.parametrize("window, is_packed", [(1, False), (5, True), (16, False), (33, True)])
def test_blockwise_equals_dense_in_value_and_gradient(window, blocks, is_packed):
  ids = segments(2, 50) if is_packed else None
  ours = attend(window, ids, block_q=blocks[0], block_k=blocks[1])
  dense = attend(window, ids, "dense")
  for got, expected in zip(value_and_grad(ours, *inputs()), value_and_grad(dense, *inputs())):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("window, L", [(1, 640), (100, 640), (129, 600), (256, 640), (500, 520)])
def test_splash_equals_dense_in_value_and_gradient(monkeypatch, window, L, fused):
  monkeypatch.setattr(splash, "FUSED_BLOCKS", 16 if fused else 0)
  ids, given = segments(1, L), inputs(B=1, L=L, H=2, K=1)
  ours = attend(window, ids, "splash_interpret", block_q=128, block_k=128)
  dense = attend(window, ids, "dense")
  for got, expected in zip(value_and_grad(ours, *given), value_and_grad(dense, *given)):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["dense", "blockwise", "splash_interpret"])
def test_a_window_of_all_tokens_is_none(kernel):
  given = inputs(L=50)
  for window in (50, 10_000):
    all_of = value_and_grad(attend(window, None, kernel), *given)
    for got, expected in zip(all_of, value_and_grad(attend(0, None, kernel), *given)):
      np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


# ---- What is computed.


@pytest.mark.parametrize("kernel", [blockwise, splash], ids=["blockwise", "splash"])
def test_blocks_out_of_the_window_are_not_touched(kernel):
  """Values of NaN there would show, as 0 * NaN is NaN: one by one, block by block of keys."""
  block, L, window = (16, 96, 20) if kernel is blockwise else (128, 640, 140)
  options = dict(block_q=block, block_k=block)
  if kernel is splash:
    options |= dict(interpret=True, window=window)
  q, k, v, d_out = (x.swapaxes(1, 2) for x in inputs(B=1, L=L, H=1, K=1))
  visible, hidden = context.up_to(jnp.arange(L), window)
  options |= dict(hidden=hidden)
  forward = jax.jit(lambda v: kernel.forward(q, k, v, visible, **options))
  out, logsumexp = forward(v)

  @jax.jit
  def backward(q, v):
    return kernel.backward(
      q, k, v, visible, None, None, jnp.nan_to_num(out), logsumexp, d_out, **options
    )

  rows = np.arange(L).reshape(-1, block)
  for column in range(L // block):
    keys = slice(column * block, (column + 1) * block)
    broken = v.at[:, :, keys].set(jnp.nan)
    d_q, _, _ = backward(q, broken)
    _, d_k, _ = backward(q.at[:, :, keys].set(jnp.nan), v)
    for row in range(L // block):
      i, j = rows[row][:, None], rows[column]
      reached = ((j <= i) & (j > i - window)).any()
      assert jnp.isnan(forward(broken)[0][:, :, rows[row]]).any() == reached
      assert jnp.isnan(d_q[:, :, rows[row]]).any() == reached
      i, j = rows[column][:, None], rows[row]
      assert jnp.isnan(d_k[:, :, rows[row]]).any() == ((j <= i) & (j > i - window)).any()


@pytest.mark.parametrize("shards, balanced", [(1, False), (4, False), (4, True), (8, True)])
@pytest.mark.parametrize("window", [1, 128, 200, 1024, 5000])
@pytest.mark.parametrize("blocks", [(128, 128), (256, 128), (128, 512), (512, 256)])
def test_splash_has_steps_for_all_blocks_and_few_others(
  monkeypatch, shards, balanced, window, blocks
):
  """Also where a block holds an early and a late chunk of the sequence."""
  monkeypatch.setattr(splash, "FUSED_BLOCKS", 0)
  L = 4096
  for numbers in context.order(L, shards, balanced).reshape(shards, -1):
    if len(numbers) % blocks[0]:
      continue
    sees = context.up_to(jnp.asarray(numbers), window)
    i, j = numbers[:, None], np.arange(L)
    pairs = (j <= i) & (j > i - window)
    tiles = pairs.reshape(-1, blocks[0], L // blocks[1], blocks[1]).any((1, 3))
    infos = splash._mask_infos(sees, L, *blocks, window)
    for found, along in zip(infos, (0, 1)):
      computed, block = np.asarray(found.block_mask[0]), np.asarray(found.data_next[0])
      made = np.zeros_like(tiles, int)
      if along == 0:
        np.add.at(made, (np.nonzero(computed)[0], block[computed > 0]), 1)
      else:
        np.add.at(made, (block[computed > 0], np.nonzero(computed)[1]), 1)
      np.testing.assert_array_equal(made, tiles)
      assert block.min() >= 0 and block.max() < tiles.shape[1 - along]
    steps = [x.block_mask.shape[2 - n] for n, x in enumerate(infos)]
    most = (blocks[0] + 2 * window) // blocks[1] + 4, (blocks[1] + window) // blocks[0] + 2
    assert steps[0] <= most[0] and steps[1] <= most[1]


def test_cost_is_linear_in_the_length():
  """By the trips of the loops over blocks: those of twice the length are twice as many."""
  trips = []
  for L in (256, 512, 1024):
    numbers = jnp.arange(L).reshape(-1, 16)
    sees = context.up_to(numbers, 24)
    seen = blockwise.seen_blocks(sees, jnp.arange(0, L, 16), 16)
    count = int(seen.sum())
    tiles = flops.attention_tiles(
      L, 1, strategy="ring", balanced=False, block_q=16, block_k=16, window=24
    )
    assert tiles == count * 256
    trips.append(count)
  assert trips[2] - trips[1] == 2 * (trips[1] - trips[0])


def test_flops_count_the_pairs_in_the_window():
  c = config.base()

  def attention_flops(length, window):
    c.model.window = window
    m = from_config(c)
    one = flops.train_flops_per_token(m, length, 0, base_is_trained=True)
    return (
      (one - 6 * flops.matrix_parameters(m))
      * length
      / (12 * m.num_layers * m.num_heads * m.head_dim)
    )

  i, j = np.mgrid[:64, :64]
  for window in (1, 10, 63, 64, 100):
    pairs = ((j <= i) & (j > i - window)).sum()
    assert abs(attention_flops(64, window) - pairs) <= 64  # half of the diagonal, and rounding
  assert attention_flops(64, 64) == attention_flops(64, 0)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("window", [3, 16, 40])
@pytest.mark.parametrize("block", [1, 8])
def test_tiles_are_the_blocks_of_the_mask(strategy, balanced, window, block):
  L, shards = 128, 4
  options = dict(strategy=strategy, balanced=balanced, window=window)
  tiles = flops.attention_tiles(L, shards, block_q=block, block_k=block, **options)
  places = context.order(L, shards, balanced).reshape(shards, -1)

  def blocks(i, j):
    mask = (j <= i[:, None]) & (j > i[:, None] - window)
    return mask.reshape(len(i) // block, block, -1, block).any((1, 3)).sum()

  if strategy == "all_gather":
    expected = max(blocks(i, np.arange(L)) for i in places)
  else:
    expected = sum(
      max(blocks(places[i], places[i - hop]) for i in range(shards)) for hop in range(shards)
    )
  assert tiles == expected * block**2


# ---- Over a mesh.

WAYS = [
  ("blockwise", "all_gather", False),
  ("blockwise", "all_gather", True),
  ("blockwise", "ring", False),
  ("blockwise", "ring", True),
  ("dense", "all_gather", True),
]


@functools.cache
def reference(window, length):
  q, k, v, weights = context_inputs(length)
  ids = packed(length=length)
  return value_and_grad(lambda *x: attention.dense(*x, ids, window=window), q, k, v, weights)


def context_inputs(length):
  return [np.asarray(x) for x in inputs(L=length)]


@pytest.mark.parametrize("window", [5, 16, 100])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_over_a_mesh_equals_dense(way, window):
  """Windows below, of and above the 16 tokens of a balanced chunk, with segments."""
  q, k, v, weights = context_inputs(256)
  cfg = config_of(*way, window=window)
  got = run(cfg, tiny.mesh(context=8), q, k, v, packed(), weights)
  for ours, expected in zip(got, reference(window, 256)):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window, balanced", [(100, True), (300, False)])
def test_splash_over_a_mesh_equals_dense(monkeypatch, window, balanced):
  monkeypatch.setattr(splash, "FUSED_BLOCKS", 0)
  q, k, v, weights = context_inputs(1024)
  cfg = config_of("splash_interpret", "all_gather", balanced, window=window, block_k=128)
  got = run(cfg, tiny.mesh(data=2, context=4), q, k, v, packed(length=1024), weights)
  for ours, expected in zip(got, reference(window, 1024)):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS[:4], ids=str)
def test_no_device_computes_blocks_before_its_windows(way):
  """Those of a chunk end with it, so NaN is seen no further than a window and a block."""
  q, k, v, weights = context_inputs(256)
  k, v = (np.where(np.arange(256)[:, None, None] < 32, np.nan, x) for x in (k, v))
  cfg = config_of(*way, window=20, block_q=16, block_k=16)
  out, d_q, _, _ = run(cfg, tiny.mesh(context=4), q, k, v, None, weights)
  for x in (out, d_q):
    assert np.isnan(x[:, :51]).any((0, 2, 3)).all() and np.isfinite(x[:, 64:]).all()


@pytest.mark.parametrize("kernel", [blockwise, splash], ids=["blockwise", "splash"])
def test_keys_of_which_no_query_sees_one_cost_nothing(kernel):
  """As in a hop of a ring, or on a device with an early part of the cache."""
  q, k, v, d_out = (x.swapaxes(1, 2) for x in inputs(B=1, L=20))
  k, v = (jnp.full_like(x, jnp.nan) for x in (k, v))
  options = dict(window=5, interpret=True) if kernel is splash else {}
  for far in (-40, 24, 100):
    visible, options["hidden"] = context.up_to(far + jnp.arange(20), 5)
    out, logsumexp = kernel.forward(q, k, v, visible, **options)
    assert not out.any() and (logsumexp == blockwise.MASKED).all()
    total = jnp.ones_like(logsumexp)
    grads = kernel.backward(q, k, v, visible, None, None, d_out, total, d_out, **options)
    assert not any(x.any() for x in grads)


def test_splash_in_a_ring_is_refused():
  q, k, v, weights = context_inputs(1024)
  cfg = config_of("splash_interpret", "ring", True, window=100)
  message = "config.model.context_parallel='ring': expected 'all_gather'"
  with pytest.raises(ValueError, match=message):
    run(cfg, tiny.mesh(context=8), q, k, v, None, weights)
  c = config.base()
  c.tokenizer = "byte"
  c.model.update(window=100, attention="splash", context_parallel="ring")
  validate.validate(c, "tpu")
  c.mesh.context = 8
  with pytest.raises(ValueError, match=message):
    validate.validate(c, "tpu")


def test_windows_below_zero_are_refused():
  c = config.base()
  c.tokenizer, c.model.window = "byte", -1
  with pytest.raises(ValueError, match="config.model.window=-1"):
    validate.validate(c)


# ---- From the cache.


@pytest.mark.parametrize("name, by_length", [("yarn", False), ("dynamic_ntk", True)])
@pytest.mark.parametrize("window", [1, 6])
def test_cached_logits_are_those_of_the_whole_sequence(name, by_length, window):
  """Prompts of 5, 9 and 13 tokens, padded to one length and prefilled 8 at a time."""
  m, of = tiny.model(window=window), ropes(name)
  expected = full_logits(m, of, PROMPTS, NEW)
  got = generator(m, of, by_length=by_length).logits(PROMPTS, NEW)
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
  assert np.abs(full_logits(tiny.model(), of, PROMPTS, NEW) - expected).max() > 1e-2


@pytest.mark.parametrize("kernel", ["dense", "splash_interpret"])
def test_other_kernels_prefill(kernel):
  m, of = tiny.model(window=6, attention=kernel), ropes("yarn")
  expected = full_logits(tiny.model(window=6), of, PROMPTS, NEW)
  got = generator(m, of, by_length=False).logits(PROMPTS, NEW)
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["dense", "blockwise", "splash_interpret"])
@pytest.mark.parametrize("new", [1, 8])
def test_devices_of_a_cache_put_their_parts_together(kernel, new):
  """Of 4 devices with 16 places each, some hold nothing that is seen."""
  cfg = ModelConfig(**tiny.MODEL, attention=kernel, window=10)
  q, k, v, _ = inputs(B=3, L=64, E=16)
  k, v = (x.swapaxes(1, 2).at[:, :, 40 + new :].set(0) for x in (k, v))
  layers = (jnp.stack([jnp.full_like(x, jnp.nan), x, jnp.full_like(x, jnp.nan)]) for x in (k, v))
  state = cache.Cache(*layers, jnp.array([0, 3, 30]), jnp.int32(40))
  run = jax.jit(lambda state, q: cache.attend(cfg, state, jnp.int32(1), q))
  out = run(state, q[:, 40 : 40 + new])
  whole = k.swapaxes(1, 2), v.swapaxes(1, 2)
  padding = jnp.arange(64) < state.padding[:, None]
  expected = attention.dense(q, *whole, padding.astype(jnp.int32), window=10)[:, 40 : 40 + new]
  np.testing.assert_allclose(out, expected, atol=1e-5)
  with jax.set_mesh(tiny.mesh(context=4)):
    split = jax.jit(lambda *x: cache.attend(cfg, *x))(state, jnp.int32(1), q[:, 40 : 40 + new])
  np.testing.assert_allclose(split, expected, atol=1e-5)


def test_a_mesh_changes_nothing():
  m, of = tiny.model(window=6, vocab_size=64, num_layers=2), ropes("dynamic_ntk")
  expected = full_logits(m, of, PROMPTS, NEW)[:, :5]
  mesh = tiny.mesh(context=4, tensor=2)
  v = jax.device_put(tiny.variables(m), sharding.shardings(mesh, tiny.variables(m)))
  with jax.set_mesh(mesh):
    got = Generator(m, v, of, depends_on_length=True, chunk=8).logits(PROMPTS, [n[:5] for n in NEW])
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
