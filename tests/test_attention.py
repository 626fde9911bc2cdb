import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax.model import attention
from rope_jax.model import blockwise as kernel
from rope_jax.model.config import ModelConfig


def inputs(B=2, L=50, H=4, K=2, E=8, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = ((B, L, H, E), (B, L, K, E), (B, L, K, E), (B, L, H, E))
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes)]


def blockwise(q, k, v, segments=None, **blocks):
  """Through the interface; sizes of the model do not matter to it."""
  cfg = ModelConfig(**tiny.MODEL, attention="blockwise", **blocks)
  return attention.attend(cfg, q, k, v, segments)


def segments(B, L, seed=0):
  """Documents that straddle blocks, different in each row."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(np.cumsum(rng.random((B, L)) < 0.1, axis=1), jnp.int32)


@pytest.mark.parametrize("L", [1, 32, 50])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
@pytest.mark.parametrize("blocks", [(16, 16), (8, 32), (24, 12), (7, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_blockwise_equals_dense_in_value_and_gradient(L, heads, blocks, packed):
  q, k, v, weights = inputs(L=L, H=heads[0], K=heads[1])
  ids = segments(2, L) if packed else None

  def value_and_grad(f):
    def loss(q, k, v):
      out = f(q, k, v)
      return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads

  got = value_and_grad(lambda *x: blockwise(*x, ids, block_q=blocks[0], block_k=blocks[1]))
  dense = value_and_grad(lambda *x: attention.dense(*x, ids))
  for ours, reference in zip(got, dense):
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_dense_is_softmax_attention():
  q, k, v, _ = (np.asarray(x, np.float64) for x in inputs(L=9))
  ids = np.asarray(segments(2, 9, seed=3))
  k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
  scores = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(8)
  visible = np.tril(np.ones((9, 9), bool)) & (ids[:, :, None] == ids[:, None, :])
  weights = np.where(visible[:, None], np.exp(scores), 0)
  expected = np.einsum("bhqk,bkhe->bqhe", weights / weights.sum(-1, keepdims=True), v)
  q, k, v, _ = inputs(L=9)
  np.testing.assert_allclose(attention.dense(q, k, v, jnp.asarray(ids)), expected, atol=1e-5)


def test_blockwise_survives_large_scores():
  q, k, v, _ = inputs()
  out = blockwise(100 * q, 100 * k, v, block_q=16, block_k=8)
  assert jnp.isfinite(out).all()
  np.testing.assert_allclose(out, attention.dense(100 * q, 100 * k, v), atol=1e-4)


def test_blockwise_in_bfloat16_keeps_its_softmax_in_float32():
  q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(L=128))
  exact = attention.dense(*(x.astype(jnp.float32) for x in (q, k, v)))
  out = blockwise(q, k, v, block_q=16, block_k=16)
  assert out.dtype == jnp.bfloat16
  # Half a unit in the last place of the output, and the rounding of the weights.
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def temporary_bytes(implementation, L):
  q, k, v, _ = inputs(B=1, L=L)

  def loss(q, k, v):
    return implementation(q, k, v).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_blockwise_memory_is_linear_in_length():
  def blocks(*x):
    return blockwise(*x, block_q=32, block_k=32)

  assert temporary_bytes(blocks, 4096) < 2.2 * temporary_bytes(blocks, 2048)
  assert temporary_bytes(attention.dense, 4096) > 3.5 * temporary_bytes(attention.dense, 2048)


def test_tiles_that_segments_hide_are_not_touched():
  """Where one was computed and masked, weights of zero would still multiply NaN."""
  q, k, v, weights = inputs(L=96)
  ids = jnp.repeat(jnp.arange(3), 32)[None].repeat(2, 0)
  spoilt = [x.at[:, 32:64].set(jnp.nan) for x in (k, v)]

  def run(k, v):
    def loss(q, k, v):
      out = blockwise(q, k, v, ids, block_q=16, block_k=8)
      return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads

  kept = np.r_[:32, 64:96]
  for got, expected in zip(run(*spoilt), run(k, v)):
    np.testing.assert_array_equal(got[:, kept], expected[:, kept])
    assert jnp.isfinite(expected).all()


@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("blocks", [(16, 8), (8, 16), (12, 20), (15, 16)])
def test_tiles_are_skipped_or_left_unmasked_as_their_masks_say(window, packed, blocks):
  B, L, block_q, block_k = 2, 240, *blocks
  visible = jnp.arange(L) + 1
  hidden = visible - window if window else None
  ids = segments(B, L) // 3 if packed else None
  q, k, v, _ = (x.swapaxes(1, 2) for x in inputs(B, L))
  *_, mask = kernel._tiled(q, k, v, visible, hidden, ids, ids, block_q, block_k)
  ours = kernel._order(mask), kernel._order(mask, by_keys=True)
  sees = np.arange(L) < np.asarray(visible)[:, None]
  if window:
    sees &= np.arange(L) >= np.asarray(hidden)[:, None]
  sees = np.broadcast_to(sees, (B, L, L))
  if packed:
    ids = np.asarray(ids)
    sees = sees & (ids[:, :, None] == ids[:, None, :])
  tiles = sees.reshape(B, L // block_q, block_q, L // block_k, block_k)
  whole, seen = tiles.all((2, 4)), tiles.any((2, 4))
  for (order, wholes, seens), w, s in zip(
    ours, (whole, whole.swapaxes(1, 2)), (seen, seen.swapaxes(1, 2))
  ):
    order, wholes, seens = (np.broadcast_to(x, (B, *x.shape[1:])) for x in (order, wholes, seens))
    for b, i in np.ndindex(*wholes.shape):
      unmasked, touched = order[b, i, : wholes[b, i]], order[b, i, : seens[b, i]]
      assert set(unmasked) == set(np.flatnonzero(w[b, i]))
      assert set(touched) >= set(np.flatnonzero(s[b, i]))
      if not packed:  # of segments only their ranges in a block are known
        assert set(touched) == set(np.flatnonzero(s[b, i]))


@pytest.mark.parametrize("group", [1, 3, 8, 64])
@pytest.mark.parametrize("length", [1, 100, 2048, 65_536])
def test_tiles_grow_with_the_length_and_not_with_the_heads(group, length):
  block_q, block_k = kernel.block_sizes(group, length, length)
  assert 1 <= block_q <= length and 1 <= block_k <= length
  assert group * block_q <= max(2048, 128 * group)
  assert block_q * 8 >= min(length, 8 * 16)
  assert kernel.block_sizes(group, length, length, 16, 24) == (min(16, length), min(24, length))


@pytest.mark.parametrize("L", [129, 255, 257])
def test_odd_lengths_are_padded_by_less_than_a_block(L):
  q, k, v, _ = inputs(B=1, L=L)
  run = jax.make_jaxpr(lambda *x: blockwise(*x, block_q=128, block_k=256))(q, k, v)
  sizes = {d for e in run.eqns for x in e.outvars for d in x.aval.shape}
  assert max(sizes) < L + 256


def test_unknown_attention_is_refused():
  class Config:
    attention = "linear"

  with pytest.raises(ValueError, match="model.attention.*'linear'"):
    attention.attend(Config, *inputs()[:3])
