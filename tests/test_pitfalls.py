"""Ten behaviours that users of other systems were hit by, one test or more for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import config, resolve, rope
from rope_jax.model.llama import unembedding

LLAMA2 = rope.base(head_dim=128, theta=1e4, original_context=4096)
ALL_DYNAMIC = [n for n in rope.SCALINGS if "seq_len" in tiny.parameters(n)]


def settings(**changes):
  c = config.base()
  c.model.head_dim = 128
  c.rope.update(scaling="yarn", context=16_384)
  c.rope.update(changes)
  return c


def test_pitfall_1_no_setting_is_ignored_and_nothing_falls_back():
  for key in ("scalng", "rope_theta", "factors"):
    with pytest.raises((AttributeError, KeyError), match=key):
      settings(**{key: 2.0})
  with pytest.raises(ValueError, match="scaling='longropee'"):
    resolve.rope(settings(scaling="longropee"))
  # A factor that the method has no use for, an option of another method.
  for bad in (dict(scaling="drope", factor=4.0), dict(llama3=dict(low_freq_factor=2.0))):
    with pytest.raises(ValueError, match="rope.factor=4.0|rope.llama3.low_freq_factor=2.0"):
      resolve.rope(settings(**bad))
  # The base is never lost, however the rope is overridden, and never falls back to 10,000.
  for name in rope.SCALINGS:
    base = rope.base(head_dim=128, theta=1e6, original_context=4096)
    r = tiny.scaled(name, base, **(dict(theta=2e6) if name == "abf" else {}))
    if name not in ("drope", "ntk", "abf", "clex", "fope"):
      fast = r.inv_freq[: 64 // 3] * np.float64(1e6) ** (np.arange(64 // 3) / 64)
      assert fast.max() <= 1 + 1e-9 and fast.max() > 0.4, name
  hf = dict(head_dim=128, max_position_embeddings=4096, rope_theta=1e6,
            rope_scaling=dict(type="linear", factor=4.0))  # fmt: skip
  np.testing.assert_allclose(rope.from_hf(hf).inv_freq[1], 1e6 ** (-1 / 64) / 4)
  # A config that is changed after a rope was made gives another rope, not the old one.
  c = settings()
  before = resolve.rope(c)
  c.rope.theta = 1e6
  assert (resolve.rope(c).inv_freq != before.inv_freq).any()


def test_pitfall_2_angles_never_pass_through_low_precision():
  m = tiny.model(dtype="bfloat16", param_dtype="bfloat16")
  r = tiny.base_rope()
  text = str(jax.make_jaxpr(lambda v, t: m.apply(v, t, r))(tiny.initial(m), tiny.tokens()))
  for operation in ("cos", "sin"):
    lines = [x for x in text.splitlines() if f"= {operation} " in x or f"= {operation}[" in x]
    assert lines and all("f32" in x for x in lines)
  # Casting a whole tree of parameters to bfloat16 must not take the frequencies along.
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), LLAMA2)
  with pytest.raises(ValueError, match="float32.*bfloat16"):
    rope.cos_sin(half, jnp.arange(4))
  with pytest.raises(ValueError, match="integers.*bfloat16"):
    rope.cos_sin(LLAMA2, jnp.arange(4, dtype=jnp.bfloat16))


@pytest.mark.parametrize("first", ["pi", "yarn", "llama3", "longrope", "dynamic_ntk", "dprope"])
def test_pitfall_3_a_scaled_rope_is_not_scaled_twice(first):
  scaled = tiny.scaled(first, LLAMA2, 4.0)
  for second in ("pi", "yarn", "ntk_critical", "dynamic_yarn", "longrope2"):
    with pytest.raises(ValueError, match=f"{second}.*already stretched by {first}, to 16384"):
      tiny.scaled(second, scaled, 2.0)
  stacked = rope.stack([scaled if scaled.short is None else LLAMA2, scaled])
  with pytest.raises(ValueError, match="already stretched"):
    rope.pi(stacked, 2.0)
  # Said explicitly, it is what it says: the next factor is of the new length.
  again = rope.pi(rope.rebase(scaled), 2.0)
  assert (again.original_context, again.context) == (16_384, 32_768)
  np.testing.assert_allclose(again.inv_freq, scaled.inv_freq / 2)


def test_pitfall_3_original_and_maximum_length_are_not_confused():
  yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096)
  hf = dict(head_dim=128, rope_parameters=yarn)
  expected = rope.yarn(LLAMA2, 4.0).inv_freq
  for maximum in (4096, 16_384):  # both are in use: the factor decides, never their ratio
    r = rope.from_hf(dict(hf, max_position_embeddings=maximum))
    np.testing.assert_allclose(r.inv_freq, expected)
    assert r.original_context == 4096
  with pytest.raises(ValueError, match="factor=4.0 and max_position_embeddings=32768 disagree"):
    rope.from_hf(dict(hf, max_position_embeddings=32_768))
  with pytest.raises(ValueError, match="rope.context=2048.*original_context=4096"):
    resolve.rope(settings(context=2048))


def test_pitfall_4_longrope_switches_above_the_original_length_and_not_at_it():
  long, short = (2.0,) * 64, (1.5,) * 64
  options = dict(long_factor=long, short_factor=short)
  for n, factor in ((1, 1.5), (4095, 1.5), (4096, 1.5), (4097, 2.0), (100_000, 2.0)):
    r = rope.longrope(LLAMA2, 4.0, seq_len=n, **options)
    np.testing.assert_allclose(LLAMA2.inv_freq / r.inv_freq, factor)
  # The length decides alone, not what was allocated or asked for before.
  c = settings(scaling="longrope", longrope=options)
  for n, factor in ((4097, 2.0), (4096, 1.5), (4097, 2.0)):
    np.testing.assert_allclose(LLAMA2.inv_freq / resolve.rope(c, n).inv_freq, factor)


@pytest.mark.parametrize("method", ALL_DYNAMIC)
def test_pitfall_5_dynamic_methods_have_no_memory(method):
  """All positions of a call share the frequencies of its length, whatever came before."""
  lengths = (2000, 5000, 16_000, 5000, 2000)
  ropes = [tiny.scaled(method, LLAMA2, 4.0, seq_len=n) for n in lengths]
  for a, b in ((0, 4), (1, 3)):  # shrinks back
    np.testing.assert_array_equal(ropes[a].inv_freq, ropes[b].inv_freq)
  assert (ropes[1].inv_freq != ropes[0].inv_freq).any()
  run = jax.jit(lambda r: rope.cos_sin(r, jnp.arange(3)))
  for r in ropes:
    run(r)
  assert run._cache_size() == 1


@pytest.mark.parametrize("method", ALL_DYNAMIC)
def test_pitfall_6_dynamic_methods_leave_short_inputs_alone(method):
  for n in (1, 4096):
    r = tiny.scaled(method, LLAMA2, 4.0, seq_len=n)
    np.testing.assert_allclose(r.inv_freq, LLAMA2.inv_freq, rtol=1e-15)


def test_pitfall_6_the_factor_can_follow_the_actual_length():
  for n in (8192, 12_288):
    dynamic = rope.dynamic_yarn(LLAMA2, seq_len=n)
    static = rope.yarn(LLAMA2, n / 4096)
    np.testing.assert_allclose(dynamic.inv_freq, static.inv_freq)
    assert dynamic.attention_scale == static.attention_scale


def test_pitfall_7_the_layout_is_a_permutation_of_the_weights():
  """Interleaved weights, permuted for the half-split layout, give the same scores; rotated once."""
  key = jax.random.key(0)
  x, w_q, w_k = (jax.random.normal(k, s) for k, s in
                 zip(jax.random.split(key, 3), ((6, 32), (32, 16), (32, 16))))  # fmt: skip
  r = rope.base(head_dim=16, theta=1e4, original_context=64)
  cos, sin = rope.cos_sin(r, jnp.arange(6))
  to_halves = np.arange(16).reshape(8, 2).T.ravel()

  def scores(w_q, w_k, interleaved):
    q, k = (rope.rotate((x @ w)[:, None], cos, sin, interleaved=interleaved) for w in (w_q, w_k))
    return jnp.einsum("qhd,khd->qk", q, k)

  expected = scores(w_q, w_k, True)
  np.testing.assert_allclose(
    scores(w_q[:, to_halves], w_k[:, to_halves], False), expected, rtol=1e-4, atol=1e-4
  )
  assert jnp.abs(scores(w_q, w_k, False) - expected).max() > 1


def test_pitfall_8_the_attention_factor_multiplies_q_and_k_once_each():
  q, k = jax.random.normal(jax.random.key(0), (2, 4, 1, 128))
  for options, scale in (
    ({}, 0.1 * np.log(4) + 1),
    (dict(attention_factor=1), 1.0),  # a whole number is a number, and 1 is not 'unset'
    (dict(attention_factor=1.7), 1.7),
    (dict(mscale=0.7, mscale_all_dim=1.0), (0.07 * np.log(4) + 1) / (0.1 * np.log(4) + 1)),
    (dict(mscale=1.0, mscale_all_dim=1.0), 1.0),
  ):
    r = rope.yarn(LLAMA2, 4.0, **options)
    assert r.attention_scale == pytest.approx(scale)
    plain = rope.yarn(LLAMA2, 4.0, attention_factor=1.0)
    a, b = (
      jnp.einsum("qhd,khd->qk", rope.rotate(q, *cs), rope.rotate(k, *cs))
      for cs in (rope.cos_sin(x, jnp.arange(4)) for x in (r, plain))
    )
    np.testing.assert_allclose(a, scale**2 * b, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match="only work together"):
    rope.yarn(LLAMA2, 4.0, mscale_all_dim=1.0)


def test_pitfall_9_llama3_constants_are_those_of_the_config():
  common = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
  hf = dict(head_dim=64, max_position_embeddings=131_072, rope_theta=5e5)
  sums = {}
  for factor in (8.0, 32.0):
    parameters = dict(common, rope_type="llama3", factor=factor)
    r = rope.from_hf(dict(hf, rope_scaling=parameters))
    assert r.history[0][1]["factor"] == factor
    sums[factor] = r.inv_freq.sum()
    slow = 5e5 ** (-31 / 32)
    np.testing.assert_allclose(r.inv_freq[-1], slow / factor)
  assert sums[32.0] == pytest.approx(2.9682022978, rel=1e-9) and sums[8.0] != sums[32.0]


@pytest.mark.parametrize("padding", ["left", "packed"])
def test_pitfall_10_positions_belong_to_documents_not_to_the_row(padding):
  m = tiny.model()
  v, r, text = tiny.variables(m), tiny.base_rope(), tiny.tokens(1, 14)
  run = jax.jit(m.apply)
  other = tiny.tokens(1, 10, seed=1)
  tokens = np.concatenate([other, text], axis=1)
  first = np.zeros(10, int) if padding == "left" else np.arange(10)
  positions = np.concatenate([first, np.arange(14)])[None].astype(np.int32)
  segments = np.repeat([-1 if padding == "left" else 0, 1], [10, 14])[None].astype(np.int32)
  got = run(v, tokens, r, positions, segments)[:, 10:]
  np.testing.assert_allclose(got, run(v, text, r), atol=1e-5)
  assert jnp.isfinite(got @ unembedding(v["params"])).all()
