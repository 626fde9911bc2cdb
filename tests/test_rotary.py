import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_jax import rope

TWO_MILLION = 2_097_152
BASE = rope.base(head_dim=128, theta=1e4, original_context=4096)


def angle_error(cos, sin, angle):
  got = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))
  return np.abs((got - angle + np.pi) % (2 * np.pi) - np.pi).max()


@pytest.mark.parametrize(
  "r",
  [
    BASE,
    rope.pi(BASE, 512.0),
    rope.ntk(BASE, 512.0),
    rope.yarn(BASE, 512.0),
    rope.llama3(BASE, 512.0),
    rope.dynamic_ntk(BASE, 1.0, seq_len=TWO_MILLION),
    rope.resonance(rope.yarn(BASE, 512.0)),
  ],
  ids=lambda r: "+".join(name for name, _ in r.history) or "base",
)
def test_angles_are_exact_to_two_million_tokens(r):
  p = np.concatenate([np.arange(0, TWO_MILLION, 991), [TWO_MILLION - 1, TWO_MILLION]])
  cos, sin = jax.jit(rope.cos_sin)(r, p.astype(np.int32))
  angle = p[:, None].astype(np.float64) * r.inv_freq
  assert angle_error(cos, sin, angle) < 1e-5
  # What the fixed point is for: a float32 product is off by thousands of times more.
  plain = (p[:, None].astype(np.float32) * r.inv_freq.astype(np.float32)).astype(np.float64)
  assert np.abs(plain - angle).max() > 1e-2 or r.inv_freq.max() < 0.5


def test_angles_are_exact_at_every_int32_position():
  p = np.concatenate([2 ** np.arange(31), 2 ** np.arange(1, 32) - 1, [2**31 - 12_345]])
  for r in (BASE, rope.yarn(BASE, 512.0)):
    cos, sin = jax.jit(rope.cos_sin)(r, p.astype(np.int32))
    assert angle_error(cos, sin, p[:, None].astype(np.float64) * r.inv_freq) < 2e-6


def test_attention_scale_multiplies_cos_and_sin():
  r = rope.yarn(BASE, 16.0)
  cos, sin = rope.cos_sin(r, jnp.arange(100))
  np.testing.assert_allclose(cos**2 + sin**2, r.attention_scale**2, rtol=1e-6)


@pytest.mark.parametrize("offset", [1, 1000, 1_000_000])
def test_scores_depend_on_relative_position_only(offset):
  q, k = jax.random.normal(jax.random.key(0), (2, 16, 1, 128))

  def scores(shift):
    cos, sin = rope.cos_sin(rope.yarn(BASE, 8.0), jnp.arange(16) + shift)
    a, b = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
    return np.einsum("qhd,khd->qk", a, b)

  np.testing.assert_allclose(scores(0), scores(offset), atol=2e-4)
  assert np.abs(scores(0) - np.einsum("qhd,khd->qk", q, k)).max() > 1  # positions do matter


def test_rotation_is_complex_multiplication():
  x = np.random.default_rng(0).normal(size=(2, 9, 3, 128))
  positions = np.arange(9) * 37
  cos, sin = rope.cos_sin(BASE, positions)
  angle = positions[:, None, None] * BASE.inv_freq
  expected = (x[..., :64] + 1j * x[..., 64:]) * np.exp(1j * angle)
  got = np.asarray(rope.rotate(jnp.asarray(x, jnp.float32), cos, sin))
  np.testing.assert_allclose(got[..., :64], expected.real, atol=1e-5)
  np.testing.assert_allclose(got[..., 64:], expected.imag, atol=1e-5)


def test_interleaved_layout_is_the_same_rotation_permuted():
  x = jax.random.normal(jax.random.key(0), (5, 2, 128))
  cos, sin = rope.cos_sin(BASE, jnp.arange(5))
  halves = jnp.concatenate([x[..., 0::2], x[..., 1::2]], -1)
  got = rope.rotate(x, cos, sin, interleaved=True)
  expected = rope.rotate(halves, cos, sin)
  np.testing.assert_array_equal(got[..., 0::2], expected[..., :64])
  np.testing.assert_array_equal(got[..., 1::2], expected[..., 64:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_has_no_concatenate_on_tpu(interleaved):
  cos, sin = rope.cos_sin(BASE, jnp.arange(5))
  f = jax.jit(lambda x, cos, sin: rope.rotate(x, cos, sin, interleaved=interleaved))
  traced = f.trace(jnp.zeros((5, 2, 128)), cos, sin)
  text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu")}
  assert "stablehlo.reverse" in text["tpu"] and "concatenate" not in text["tpu"]
  assert "concatenate" in text["cpu"] and "stablehlo.reverse" not in text["cpu"]


def test_rotation_keeps_bfloat16_but_computes_in_float32():
  x = jax.random.normal(jax.random.key(0), (5, 2, 128), jnp.bfloat16)
  cos, sin = rope.cos_sin(BASE, jnp.arange(5) + 4000)
  got = rope.rotate(x, cos, sin)
  exact = rope.rotate(x.astype(jnp.float32), cos, sin)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_new_factors_do_not_recompile():
  f = jax.jit(lambda r, p: rope.cos_sin(r, p)[0])
  p = jnp.arange(10)
  outputs = [
    f(r, p)
    for r in (
      BASE, rope.pi(BASE, 2.0), rope.yarn(BASE, 16.0), rope.yarn(BASE, 32.0),
      rope.resonance(rope.ntk(BASE, 3.0)), rope.dynamic_ntk(BASE, 2.0, seq_len=9000),
    )
  ]  # fmt: skip
  assert f._cache_size() == 1
  assert len({np.asarray(o).tobytes() for o in outputs}) == len(outputs)


def test_ropes_can_be_stacked_and_vmapped():
  ropes = [rope.pi(BASE, s) for s in (1.0, 2.0, 4.0)]
  stacked = jax.tree.map(lambda *x: np.stack(x), *ropes)
  cos, _ = jax.vmap(rope.cos_sin, in_axes=(0, None))(stacked, jnp.arange(7))
  for i, r in enumerate(ropes):
    np.testing.assert_array_equal(cos[i], rope.cos_sin(r, jnp.arange(7))[0])


def test_frequencies_can_be_differentiated():
  positions = jnp.array([0, 3, 50])
  inv_freq = jnp.asarray(BASE.inv_freq, jnp.float32)

  def f(inv_freq):
    return rope.cos_sin(BASE.with_inv_freq(inv_freq), positions)[1].sum()

  expected = (np.asarray(positions)[:, None] * np.cos(positions[:, None] * BASE.inv_freq)).sum(0)
  np.testing.assert_allclose(jax.grad(f)(inv_freq), expected, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("groups", [0, 2])
def test_the_derivative_of_a_rotation_is_that_of_its_definition(interleaved, groups):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 4, 16)), jnp.float32)
  shape = (2, 5, groups, 6) if groups else (2, 5, 6)
  cos, sin, weights = (
    jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, shape, (2, 5, 4, 16))
  )

  def ours(x, cos, sin):
    return jnp.sum(weights * jnp.sin(rope.rotate(x, cos, sin, interleaved=interleaved)))

  def defined(x, cos, sin):
    cos, sin = (jnp.repeat(t, 2, 2) if groups else t[..., None, :] for t in (cos, sin))
    if interleaved:
      a, b = x[..., 0:12:2], x[..., 1:12:2]
    else:
      a, b = x[..., :6], x[..., 6:12]
    parts = [a * cos - b * sin, b * cos + a * sin]
    out = (
      jnp.stack(parts, -1).reshape(*x.shape[:-1], 12) if interleaved else jnp.concatenate(parts, -1)
    )
    return jnp.sum(weights * jnp.sin(jnp.concatenate([out, x[..., 12:]], -1)))

  for wanted in ((0,), (1,), (2,), (0, 1, 2)):
    for got, expected in zip(*(jax.jit(jax.grad(f, wanted))(x, cos, sin) for f in (ours, defined))):
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_float_positions_are_refused():
  with pytest.raises(ValueError, match="integers"):
    rope.cos_sin(BASE, jnp.arange(4, dtype=jnp.bfloat16))


def test_wrong_head_dim_is_refused():
  cos, sin = rope.cos_sin(BASE, jnp.arange(4))
  with pytest.raises(ValueError, match="head_dim 64"):
    rope.rotate(jnp.zeros((4, 1, 64)), cos, sin)


@pytest.mark.parametrize(
  "key, value", [("head_dim", 127), ("head_dim", 0), ("theta", 1.0), ("original_context", 0)]
)
def test_impossible_base_is_refused_by_name(key, value):
  with pytest.raises(ValueError, match=key):
    rope.base(**{**dict(head_dim=128, theta=1e4, original_context=4096), key: value})


def test_transforms_inside_jit_are_refused():
  with pytest.raises(ValueError, match="host"):
    jax.jit(lambda r: rope.pi(r, 2.0).inv_freq)(BASE)


def test_nonsense_frequencies_are_refused():
  with pytest.raises(ValueError, match="mine.*finite"):
    BASE.apply("mine", np.full(64, np.nan))
  assert dataclasses.replace(BASE).head_dim == 128


def test_partial_rotation_takes_angles_with_or_without_a_batch():
  """Also where there are as many sequences as tokens, which must not be mixed up."""
  r = rope.base(head_dim=16, theta=1e4, original_context=64, partial_rotary_factor=0.5)
  x = jax.random.normal(jax.random.key(0), (5, 5, 3, 16))
  cos, sin = rope.cos_sin(r, jnp.arange(5))
  batched = rope.cos_sin(r, jnp.broadcast_to(jnp.arange(5), (5, 5)))
  whole = rope.rotate(x[..., :8], cos, sin)
  for angles in ((cos, sin), batched):
    out = rope.rotate(x, *angles)
    np.testing.assert_array_equal(out[..., :8], whole)
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
