import json

import numpy as np
import pytest
import tiny
from goldens import make_hf_rope

from rope_jax import rope

GOLDEN = json.loads(make_hf_rope.PATH.read_text())
LLAMA2 = dict(head_dim=128, theta=1e4, original_context=4096)
LLAMA3 = dict(head_dim=128, theta=5e5, original_context=8192)
METHODS = [name for name in rope.SCALINGS if name != "none"]
WITH_FACTOR = [name for name in METHODS if "factor" in tiny.parameters(name)]
# Methods that leave the frequencies as they are for factor 1, or for no more than L tokens.
IDENTITY = set(METHODS) - {"abf", "power", "truncated", "cope", "hope", "drope", "fope"}


def build(shape, method, options):
  return rope.SCALINGS[method](rope.base(**shape), **options)


def check_against_hf(shape, method, options, inv_freq, attention_factor):
  ours = build(shape, method, options)
  np.testing.assert_allclose(ours.inv_freq, inv_freq, rtol=1e-6, err_msg=f"{method} {options}")
  np.testing.assert_allclose(ours.attention_scale, attention_factor, rtol=1e-6)


def test_equals_golden_values_of_transformers():
  assert GOLDEN["transformers"].startswith("5.23"), "regenerate with the version that is pinned"
  assert len(GOLDEN["cases"]) > 300
  for c in GOLDEN["cases"]:
    check_against_hf(c["shape"], c["method"], c["options"], c["inv_freq"], c["attention_factor"])


def test_equals_transformers_live():
  for shape, method, options, theirs, seq_len in make_hf_rope.cases():
    exact = make_hf_rope.oracle(shape, theirs, seq_len)
    check_against_hf(shape, method, options, *exact)
    # As it runs by default, but for its own rounding error.
    single, factor = make_hf_rope.oracle(shape, theirs, seq_len, "float32")
    error = np.abs(build(shape, method, options).inv_freq - single)
    rounding = np.abs(np.subtract(single, exact[0]))
    assert (error <= 1e-6 * np.abs(single) + rounding).all(), (method, options)
    assert rounding.max() <= 2e-6 and factor == pytest.approx(exact[1], rel=1e-6)


@pytest.mark.parametrize(
  "theta, factor, length, expected",
  [
    (1e4, 16, 4096, [1, 0.0562341325, 0.00567307692, 6.25e-05, 7.2173874e-06]),
    (5e5, 8, 8192, [1, 0.0148556889, 0.000395147907, 6.64786987e-06, 3.06892599e-07]),
    (1e6, 4, 32768, [1, 0.0133352143, 0.000602941176, 7.90569415e-06, 3.1023444e-07]),
  ],
)
def test_yarn_equals_published_golden_values(theta, factor, length, expected):
  r = rope.yarn(rope.base(head_dim=128, theta=theta, original_context=length), factor)
  np.testing.assert_allclose(r.inv_freq[[0, 20, 32, 48, 63]], expected, rtol=1e-8)
  np.testing.assert_allclose(r.attention_scale, 0.1 * np.log(factor) + 1)


def test_llama3_equals_published_sums():
  r = rope.llama3(rope.base(**LLAMA3), 8)
  base = rope.base(**LLAMA3).inv_freq
  np.testing.assert_allclose(r.inv_freq.sum(), 5.3860582007, rtol=1e-10)
  other = rope.llama3(rope.base(head_dim=64, theta=5e5, original_context=8192), 32)
  np.testing.assert_allclose(other.inv_freq.sum(), 2.9682022978, rtol=1e-10)
  assert (r.inv_freq == base).sum() == 29
  assert np.isclose(r.inv_freq, base / 8, rtol=1e-12).sum() == 29


@pytest.mark.parametrize("seq_len, expected", [(8192, 30527.7367), (16384, 72195.8601)])
def test_dynamic_ntk_equals_published_bases(seq_len, expected):
  r = rope.dynamic_ntk(rope.base(**LLAMA2), 2, seq_len=seq_len)
  np.testing.assert_allclose(r.inv_freq[1] ** -64.0, expected, rtol=1e-8)


def test_ntk_is_a_larger_base():
  expected = rope.base(head_dim=128, theta=40889.9424, original_context=4096)
  np.testing.assert_allclose(
    rope.ntk(rope.base(**LLAMA2), 4).inv_freq, expected.inv_freq, rtol=1e-8
  )


def test_paper_ramp_and_code_ramp_differ_as_computed():
  base = rope.base(**LLAMA2)
  for ramp, multiplier in (("dim", 0.567), ("rotation", 0.229)):
    r = rope.ntk_by_parts(base, 16, ramp=ramp)
    np.testing.assert_allclose(r.inv_freq[32] / base.inv_freq[32], multiplier, atol=5e-4)


def test_yarn_is_ntk_by_parts_with_a_temperature():
  base = rope.base(**LLAMA2)
  for ramp in ("dim", "rotation"):
    yarn, by_parts = rope.yarn(base, 8, ramp=ramp), rope.ntk_by_parts(base, 8, ramp=ramp)
    np.testing.assert_array_equal(yarn.inv_freq, by_parts.inv_freq)
    assert (yarn.attention_scale, by_parts.attention_scale) == (0.1 * np.log(8) + 1, 1.0)


@pytest.mark.parametrize("method", sorted(IDENTITY))
def test_factor_one_is_identity(method):
  base = rope.base(**LLAMA2)
  options = dict(proportion=1.0) if method == "proportional" else {}
  r = tiny.scaled(method, base, 1.0, seq_len=4096, **options)
  np.testing.assert_allclose(r.inv_freq, base.inv_freq, rtol=1e-15)
  assert r.attention_scale == 1.0


@pytest.mark.parametrize("method", WITH_FACTOR)
@pytest.mark.parametrize("factor", [0.99, 0.0, -2.0, float("nan"), float("inf")])
def test_impossible_factor_is_refused_by_name(method, factor):
  with pytest.raises(ValueError, match=f"{method}.*factor"):
    tiny.scaled(method, rope.base(**LLAMA2), factor, seq_len=8192)


@pytest.mark.parametrize(
  "method, options, key",
  [
    ("yarn", dict(beta_fast=1.0, beta_slow=2.0), "beta_slow"),
    ("yarn", dict(beta_slow=0.0), "beta_slow"),
    ("yarn", dict(ramp="index"), "ramp"),
    ("yarn", dict(mscale=1.0), "mscale_all_dim"),
    ("yarn", dict(mscale=1.0, mscale_all_dim=1.0, attention_factor=1.0), "attention_factor"),
    ("yarn", dict(attention_factor=-1.0), "attention_factor"),
    ("ntk_by_parts", dict(ramp="paper"), "ramp"),
    ("llama3", dict(low_freq_factor=4.0, high_freq_factor=4.0), "high_freq_factor"),
    ("ntk_mixed", dict(b=0.0), "ntk_mixed.b"),
    ("ntk_by_parts_v1", dict(beta=(0.5, 0.75)), "ntk_by_parts_v1.beta"),
    ("ntk_by_parts_v1", dict(gamma=(1.0,)), "ntk_by_parts_v1.gamma"),
    ("dynamic_ntk", dict(seq_len=-1), "dynamic_ntk.*seq_len"),
    ("dynamic_yarn", dict(seq_len=-1), "dynamic_yarn.*seq_len"),
    ("dynamic_yarn", dict(beta_fast=0.5), "dynamic_yarn.*beta_fast"),
    ("longrope", dict(seq_len=-1), "longrope.*seq_len"),
    ("longrope", dict(long_factor=()), "longrope.long_factor"),
    ("longrope", dict(long_factor=(2.0,) * 63), "longrope.long_factor.*64.*63"),
    ("longrope", dict(short_factor=(0.0,) * 64), "longrope.short_factor.*positive"),
    ("longrope", dict(long_factor=("x",) * 64), "longrope.long_factor"),
    ("longrope", dict(attention="yorn"), "longrope.attention.*'yorn'"),
    ("longrope", dict(attention="-1"), "longrope.attention"),
    ("longrope", dict(start_tokens=-1), "longrope.start_tokens"),
    ("longrope2", dict(critical=64), "longrope2.critical.*63"),
    ("longrope2", dict(tail=(2.0,) * 5), "longrope2.tail.*18 factors"),
    ("longrope2", dict(tail=(1.5,) * 18), "longrope2.tail.*factor=2"),
    ("longrope2", dict(tail=(3.0,) + (2.0,) * 17), "longrope2.tail.*fall"),
    ("dynamic_longrope", dict(long_factor=(1.0,)), "dynamic_longrope.long_factor"),
    ("dprope", dict(threshold=-1.0), "dprope.threshold"),
    ("dprope", dict(threshold=0.1, interpolated_dims=4), "dprope.interpolated_dims"),
    ("dprope", dict(interpolated_dims=3), "dprope.interpolated_dims.*even"),
    ("dprope", dict(interpolated_dims=130), "dprope.interpolated_dims.*128"),
    ("dprope", dict(candidates=()), "dprope.candidates"),
    ("dprope", dict(candidates=("py",)), "dprope.candidates.*'py'"),
    ("dprope", dict(direction="back"), "dprope.direction"),
    ("dprope", dict(reduction="max"), "dprope.reduction"),
    ("dprope", dict(bins=0), "bins"),
    ("abf", dict(theta=100.0), "abf.theta"),
    ("power", dict(exponent=-1.0), "power.exponent"),
    ("truncated", dict(cutoff=-1), "truncated.cutoff"),
    ("proportional", dict(proportion=0.0), "proportional.proportion"),
    ("cope", dict(pairs=65), "cope.pairs.*64"),
    ("hope", dict(rotations=0.0), "hope.rotations"),
    ("fope", dict(gain=-1.0), "fope.gain"),
    ("fope", dict(dropped="two"), "fope.dropped"),
    ("clex", dict(max_factor=0), "clex.max_factor"),
    ("clex", dict(activation="relu"), "clex.activation"),
    ("clex", dict(time_step=0.0), "clex.time_step"),
  ],
)
def test_impossible_option_is_refused_by_name(method, options, key):
  with pytest.raises(ValueError, match=key):
    tiny.scaled(method, rope.base(**LLAMA2), **({"seq_len": 8192} | options))


@pytest.mark.parametrize(
  "shape, factor, base",
  [(dict(head_dim=96, theta=1e4, original_context=2048), 64, 7.49e6), (LLAMA3, 16, 7.98e7)],
)
def test_ntk_by_critical_dimension_has_the_published_bases(shape, factor, base):
  r = rope.ntk_critical(rope.base(**shape), factor)
  np.testing.assert_allclose(r.inv_freq[1] ** -(shape["head_dim"] / 2), base, rtol=1e-3)


def test_ntk_by_critical_dimension_interpolates_the_critical_wavelength_by_the_factor():
  base = rope.base(**LLAMA2)
  r = rope.ntk_critical(base, 4)
  at = [np.interp(np.log(w), np.log(x.wavelengths), np.arange(64.0))
        for x, w in ((base, 4096), (r, 16_384))]  # fmt: skip
  np.testing.assert_allclose(*at)


def test_mixed_ntk_spreads_the_factor_over_the_pairs():
  base = rope.base(**LLAMA2)
  ratio = base.inv_freq / rope.ntk_mixed(base, 8.0).inv_freq
  np.testing.assert_allclose(ratio[-1], 8.0)
  i = np.arange(64)
  a = np.log(8.0) / 64**0.625
  np.testing.assert_allclose(ratio, np.exp(a * (i + 1) ** 0.625))
  even = base.inv_freq / rope.ntk_mixed(base, 8.0, b=1.0).inv_freq
  np.testing.assert_allclose(even, 8.0 ** ((i + 1) / 64))


def test_a_larger_base_becomes_the_base():
  r = rope.abf(rope.base(**LLAMA2), theta=1e6)
  expected = rope.base(**{**LLAMA2, "theta": 1e6})
  np.testing.assert_allclose(r.inv_freq, expected.inv_freq)
  assert r.theta == 1e6
  np.testing.assert_allclose(rope.yarn(r, 4).inv_freq, rope.yarn(expected, 4).inv_freq)


def test_proportional_and_partial_rotary_differ():
  kept = rope.proportional(rope.base(**LLAMA2), proportion=0.5)
  spaced = rope.base(**LLAMA2, partial_rotary_factor=0.5)
  assert kept.inv_freq.shape == (64,) and spaced.inv_freq.shape == (32,)
  np.testing.assert_array_equal(kept.inv_freq[:32], rope.base(**LLAMA2).inv_freq[:32])
  assert not kept.inv_freq[32:].any()
  np.testing.assert_allclose(spaced.inv_freq, 1e4 ** -(np.arange(32) / 32))
  with pytest.raises(ValueError, match="partial_rotary_factor"):
    rope.proportional(spaced)


def test_hope_keeps_what_turns_within_the_window_and_drope_nothing():
  base = rope.base(**LLAMA2)
  kept = rope.hope(base).inv_freq > 0
  np.testing.assert_array_equal(kept, base.wavelengths <= 4096)
  assert not rope.drope(base).inv_freq.any()


def test_transforms_without_a_factor_compose_in_any_order_with_one_that_has():
  base = rope.base(**LLAMA2)
  a = rope.pi(rope.power(base), 4.0)
  b = rope.power(rope.pi(base, 4.0))
  np.testing.assert_allclose(a.inv_freq, b.inv_freq)


@pytest.mark.parametrize("method", METHODS)
def test_resonance_is_defined_over_every_method(method):
  r = rope.resonance(tiny.scaled(method, rope.base(**LLAMA2), 4.0))
  turning = r.inv_freq > 0
  np.testing.assert_allclose(r.wavelengths[turning], np.round(r.wavelengths[turning]), rtol=1e-12)
  assert r.history[-1][0] == "resonance"


def test_a_scaled_base_has_its_ramp_by_its_own_rotations():
  """YaRN over a base that is not geometric: the pairs that turn `beta` times, not theta's."""
  own = rope.rebase(rope.llama3(rope.base(**LLAMA3), 8.0))
  assert (own.original_context, own.context) == (65_536, 65_536)
  r = rope.yarn(own, 2.0)
  rotations = 65_536 * own.inv_freq / (2 * np.pi)
  ratio = own.inv_freq / r.inv_freq
  np.testing.assert_allclose(ratio[rotations > 40], 1.0)
  np.testing.assert_allclose(ratio[rotations < 0.7], 2.0)
  # Where the base is plain, rebasing changes nothing.
  plain = rope.base(**LLAMA2)
  np.testing.assert_array_equal(
    rope.yarn(rope.rebase(plain), 2).inv_freq, rope.yarn(plain, 2).inv_freq
  )


def test_transforms_compose_and_remember():
  r = rope.resonance(rope.yarn(rope.base(**LLAMA2), 16))
  assert [name for name, _ in r.history] == ["yarn", "resonance"]
  assert r.history[0][1]["factor"] == 16
  np.testing.assert_allclose(r.wavelengths, np.round(r.wavelengths), rtol=1e-12)
  assert r.attention_scale == rope.yarn(rope.base(**LLAMA2), 16).attention_scale
