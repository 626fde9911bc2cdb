import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import rope

BASE = rope.base(head_dim=16, theta=1e4, original_context=64)


def test_fope_without_noise_is_rope_whose_slow_pairs_stand_still():
  r = rope.fope(BASE, gain=0.0, kv_heads=2)
  still = BASE.wavelengths >= 64
  assert 0 < still.sum() < 8
  cos, sin = rope.cos_sin(r, jnp.arange(200))
  expected_cos, expected_sin = rope.cos_sin(rope.hope(BASE), jnp.arange(200))
  for head in range(2):
    np.testing.assert_allclose(cos[:, head], expected_cos, atol=1e-6)
    np.testing.assert_allclose(sin[:, head], expected_sin, atol=1e-6)


def test_fope_mixes_the_kept_frequencies_of_each_head():
  """The formula, written out: cos = C (I + N_c), sin = S (I + N_s) over the kept pairs."""
  r = rope.fope(BASE, gain=0.5, kv_heads=3, seed=1)
  kept = np.flatnonzero(BASE.inv_freq > 2 * np.pi / 64)
  cos, sin = rope.cos_sin(r, jnp.arange(70))
  angles = np.arange(70)[:, None] * BASE.inv_freq[kept]
  for head in range(3):
    for got, basis, mix, rest in (
      (cos, np.cos(angles), r.mix[0][head], 1.0),
      (sin, np.sin(angles), r.mix[1][head], 0.0),
    ):
      np.testing.assert_allclose(got[:, head, kept], basis @ mix[np.ix_(kept, kept)], atol=1e-5)
      np.testing.assert_allclose(got[:, head, len(kept) :], rest, atol=1e-6)
  noise = r.mix[0][:, : len(kept), : len(kept)] - np.eye(len(kept))
  assert noise.std() == pytest.approx(0.5 / np.sqrt(len(kept)), rel=0.2)
  assert (r.mix[0] != r.mix[1]).any() and (r.mix[0][0] != r.mix[0][1]).any()
  again, other = (rope.fope(BASE, gain=0.5, kv_heads=3, seed=s) for s in (1, 2))
  np.testing.assert_array_equal(r.mix[0], again.mix[0])
  assert (r.mix[0] != other.mix[0]).any()


def test_fope_released_padding_turns_dropped_pairs_by_45_degrees_and_doubles_their_logits():
  r = rope.fope(BASE, gain=0.0, per_head=False, dropped="one")
  q, k = jax.random.normal(jax.random.key(0), (2, 5, 1, 16))
  still = np.tile(BASE.wavelengths >= 64, 2)
  cos, sin = rope.cos_sin(r, jnp.arange(5))
  a, b = rope.rotate(q * still, cos, sin), rope.rotate(k * still, cos, sin)
  np.testing.assert_allclose(
    jnp.einsum("qhd,khd->qk", a, b),
    2 * jnp.einsum("qhd,khd->qk", q * still, k),
    rtol=1e-4,
    atol=1e-4,
  )


def test_fope_gives_query_heads_the_mix_of_their_kv_head():
  """A model with all heads' mixes equal is the model with one shared mix."""
  m = tiny.model()
  v, t = tiny.variables(m), tiny.tokens()
  shared = rope.fope(BASE, per_head=False)
  per_head = rope.fope(BASE, kv_heads=2)
  run = jax.jit(m.apply)
  equal = tuple(np.stack([x, x]) for x in shared.mix[:2])
  same = dataclasses.replace(per_head, mix=(*equal, shared.mix[2]))
  np.testing.assert_allclose(run(v, t, same), run(v, t, shared), atol=1e-5)
  assert jnp.abs(run(v, t, per_head) - run(v, t, shared)).max() > 1e-2


CLEX = dict(max_factor=4, param_factor=1, activation="tanh", time_step=0.1)


def clex_rope(t):
  return rope.clex(BASE, seq_len=64 * t, **CLEX)


def test_clex_untrained_is_ntk_aware_and_its_parameters_learn():
  m, plain = tiny.model(clex=tuple(CLEX.items())), tiny.model()
  v = tiny.initial(m)
  assert v["phase"]["clex"]["up"].shape == (8, 16) and not v["phase"]["clex"]["down"].any()
  t = tiny.tokens()
  run = jax.jit(m.apply)
  for time in (1, 3):
    expected = jax.jit(plain.apply)(v, t, rope.ntk(BASE, 2 * time - 1))
    np.testing.assert_allclose(run(v, t, clex_rope(time)), expected, atol=1e-4)
  assert run._cache_size() == 1
  loss = jax.jit(lambda phase, r: m.apply({**v, "phase": phase}, t, r).std())
  at_one, at_three = (jax.grad(loss)(v["phase"], clex_rope(time))["clex"] for time in (1, 3))
  assert jnp.abs(at_three["down"]).max() > 0
  assert not at_one["down"].any()  # nothing to correct at the original length


def test_clex_is_capped_at_its_largest_factor():
  assert [clex_rope(t).time for t in (1, 2, 4, 9)] == [1, 2, 4, 4]
  assert rope.clex(BASE, seq_len=65, **CLEX).time == 2


def test_a_rope_that_clex_did_not_make_is_refused():
  with pytest.raises(ValueError, match="no time"):
    rope.clex_correct(BASE, rope.clex_init(jax.random.key(0), 8), max_factor=2)
