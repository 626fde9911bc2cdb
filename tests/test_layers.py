"""Frequencies by layer and by head, partial rotary, and two ropes in one batch, in the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import rope
from rope_jax.model.llama import Block

BASE = tiny.base_rope()
RUN = jax.jit(tiny.model().apply)
V = tiny.variables(tiny.model())
T = tiny.tokens()


def test_layers_with_equal_frequencies_are_one_rope():
  yarn = rope.yarn(BASE, 4.0)
  np.testing.assert_allclose(RUN(V, T, rope.stack([yarn] * 3)), RUN(V, T, yarn), atol=1e-5)


def test_heads_with_equal_frequencies_are_one_rope():
  yarn = rope.resonance(rope.yarn(BASE, 4.0))
  stacked = rope.stack([yarn] * 2, axis="head")
  assert stacked.inv_freq.shape == (1, 2, 8)
  np.testing.assert_allclose(RUN(V, T, stacked), RUN(V, T, yarn), atol=1e-5)


def test_each_layer_has_its_own():
  """Against a model of one layer at a time."""
  ropes = [BASE, rope.yarn(BASE, 4.0), rope.resonance(rope.pi(BASE, 2.0))]
  got = RUN(V, T, rope.stack(ropes))
  # The identity after the last layer: final norm of the residual stream, layer by layer.
  m = tiny.model(num_layers=1)
  table = V["params"]["embedding"]
  x = table[T]
  for i, r in enumerate(ropes):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], V["params"]["layers"])
    x = residual(m, dict(V["params"], layers=layer), x, r)
  variance = jnp.mean(x**2, -1, keepdims=True)
  expected = x * jax.lax.rsqrt(variance + 1e-5) * V["params"]["final_norm"]["scale"]
  np.testing.assert_allclose(got, expected, atol=2e-5)
  others = [RUN(V, T, rope.stack([ropes[j] for j in order])) for order in ((0, 2, 1), (1, 0, 2))]
  assert all(jnp.abs(got - o).max() > 1e-2 for o in others)


def residual(m, params, x, r):
  """What the only layer of a model makes of the residual stream x."""
  layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
  angles = rope.by_channel(*rope.cos_sin(r, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])))
  apply = jax.jit(Block(m.config).apply)
  return apply(dict(params=layer), (x, None), None, [angles], [], {}, None)[0][0]


def test_heads_of_a_group_turn_with_their_key():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 10, 4, 16))
  r = rope.stack([BASE, rope.pi(BASE, 4.0)], axis="head")

  def scores(shift):
    cos, sin = rope.cos_sin(r, jnp.arange(10)[None] + shift)
    assert cos.shape == (1, 10, 2, 8)
    a, b = rope.rotate(q, cos, sin), rope.rotate(k[:, :, :2], cos, sin)
    return jnp.einsum("bqgrd,bkgd->bgrqk", a.reshape(1, 10, 2, 2, 16), b)

  np.testing.assert_allclose(scores(0), scores(1000), atol=1e-4)


def test_gradients_reach_the_frequencies_of_each_layer():
  stacked = jnp.asarray(np.stack([BASE.inv_freq] * 3), jnp.float32)
  grads = jax.jit(jax.grad(lambda f: RUN(V, T, BASE.with_inv_freq(f)).std()))(stacked)
  assert grads.shape == (3, 8) and (jnp.abs(grads).sum(1) > 0).all()


def test_another_number_of_layers_is_refused():
  with pytest.raises(ValueError, match="2 layers.*3"):
    tiny.model().apply(V, T, rope.stack([BASE] * 2))
  with pytest.raises(ValueError, match="not alike"):
    rope.stack([BASE, rope.base(head_dim=8, theta=1e4, original_context=64)])
  with pytest.raises(ValueError, match="theta is 5000.0 and 10000.0"):
    rope.stack([BASE, rope.base(head_dim=16, theta=5e3, original_context=64)])
  with pytest.raises(ValueError, match="no ropes"):
    rope.stack([])
  with pytest.raises(ValueError, match="axis"):
    rope.stack([BASE], axis="pair")
  mixed = rope.fope(BASE)
  with pytest.raises(ValueError, match="stacked"):
    rope.stack([mixed, mixed])


def test_partial_rotary_turns_the_first_channels_and_no_other():
  r = rope.base(head_dim=16, theta=1e4, original_context=64, partial_rotary_factor=0.5)
  x = jax.random.normal(jax.random.key(0), (9, 2, 16))
  cos, sin = rope.cos_sin(r, jnp.arange(9))
  got = rope.rotate(x, cos, sin)
  np.testing.assert_array_equal(got[..., 8:], x[..., 8:])
  np.testing.assert_array_equal(got[..., :8], rope.rotate(x[..., :8], cos, sin))
  m = tiny.model(rotary_dim=8)
  assert jnp.abs(jax.jit(m.apply)(V, T, r) - RUN(V, T, BASE)).max() > 1e-2
  with pytest.raises(ValueError, match="8 channels of model.head_dim=16"):
    m.apply(V, T, BASE)
  with pytest.raises(ValueError, match="head_dim 8"):
    tiny.model().apply(V, T, r)


@pytest.mark.parametrize("factor", [0.0, 1.5, 0.45, -1.0])
def test_impossible_shares_are_refused(factor):
  with pytest.raises(ValueError, match="partial_rotary_factor"):
    rope.base(head_dim=16, theta=1e4, original_context=64, partial_rotary_factor=factor)


def test_short_and_long_segments_of_one_batch_have_their_own_rope():
  yarn = rope.yarn(BASE, 4.0)
  both = dataclasses.replace(yarn, short=BASE)
  short = np.zeros(T.shape, bool)
  short[0] = True
  got = jax.jit(lambda r, s: tiny.model().apply(V, T, r, short_BxL=s))(both, short)
  np.testing.assert_array_equal(got[0], RUN(V, T, BASE)[0])
  np.testing.assert_array_equal(got[1], RUN(V, T, yarn)[1])
  # Without marks, a rope is what it is.
  np.testing.assert_array_equal(RUN(V, T, both), RUN(V, T, yarn))
  with pytest.raises(ValueError, match="short"):
    rope.cos_sin(BASE, jnp.arange(3), short=jnp.ones(3, bool))


def test_fractional_positions_are_interpolation():
  positions = jnp.arange(40)
  cos, sin = rope.cos_sin(BASE, positions // 4, fractions=(positions % 4) / 4.0)
  expected = rope.cos_sin(rope.pi(BASE, 4.0), positions)
  np.testing.assert_allclose(cos, expected[0], atol=1e-6)
  np.testing.assert_allclose(sin, expected[1], atol=1e-6)
