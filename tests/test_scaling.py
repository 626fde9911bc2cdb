import json

import numpy as np
import pytest
from goldens import make_hf_rope

from rope_jax import rope

GOLDEN = json.loads(make_hf_rope.PATH.read_text())
LLAMA2 = dict(head_dim=128, theta=1e4, original_context=4096)
OPTIONS = dict(dynamic_ntk=dict(seq_len=10_000))  # what has no default
STATIC = [name for name in rope.SCALINGS if name != "none"]


def build(shape, method, options):
  return rope.SCALINGS[method](rope.base(**shape), **options)


def check_against_hf(shape, method, options, inv_freq, attention_factor):
  ours = build(shape, method, options)
  np.testing.assert_allclose(ours.inv_freq, inv_freq, rtol=1e-6, err_msg=f"{method} {options}")
  np.testing.assert_allclose(ours.attention_scale, attention_factor, rtol=1e-6)


def test_equals_golden_values_of_transformers():
  assert GOLDEN["transformers"].startswith("5.23"), "regenerate with the version that is pinned"
  assert len(GOLDEN["cases"]) > 150
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
  r = rope.llama3(rope.base(head_dim=128, theta=5e5, original_context=8192), 8)
  base = rope.base(head_dim=128, theta=5e5, original_context=8192).inv_freq
  np.testing.assert_allclose(r.inv_freq.sum(), 5.3860582007, rtol=1e-10)
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


@pytest.mark.parametrize("method", STATIC)
def test_factor_one_is_identity(method):
  base = rope.base(**LLAMA2)
  options = dict(seq_len=4096) if method == "dynamic_ntk" else {}
  r = rope.SCALINGS[method](base, 1.0, **options)
  np.testing.assert_allclose(r.inv_freq, base.inv_freq, rtol=1e-15)
  assert r.attention_scale == 1.0


@pytest.mark.parametrize("method", STATIC)
@pytest.mark.parametrize("factor", [0.99, 0.0, -2.0, float("nan"), float("inf")])
def test_impossible_factor_is_refused_by_name(method, factor):
  with pytest.raises(ValueError, match=f"{method}.*factor"):
    rope.SCALINGS[method](rope.base(**LLAMA2), factor, **OPTIONS.get(method, {}))


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
    ("dynamic_ntk", dict(seq_len=0), "seq_len"),
  ],
)
def test_impossible_option_is_refused_by_name(method, options, key):
  with pytest.raises(ValueError, match=key):
    rope.SCALINGS[method](rope.base(**LLAMA2), 2.0, **options)


def test_transforms_compose_and_remember():
  r = rope.resonance(rope.yarn(rope.base(**LLAMA2), 16))
  assert [name for name, _ in r.history] == ["yarn", "resonance"]
  assert r.history[0][1]["factor"] == 16
  np.testing.assert_allclose(r.wavelengths, np.round(r.wavelengths), rtol=1e-12)
  assert r.attention_scale == rope.yarn(rope.base(**LLAMA2), 16).attention_scale


def test_resonance_rounds_to_the_published_wavelengths():
  r = rope.resonance(rope.base(**LLAMA2))
  rounded = np.round(r.wavelengths).astype(int)
  assert rounded[:16].tolist() == [6, 7, 8, 10, 11, 13, 15, 17, 20, 23, 26, 31, 35, 41, 47, 54]
  lcm = 1
  for wavelength in rounded[:46].tolist():  # the pre-critical pairs of Llama-2
    lcm = int(np.lcm.reduce(np.array([lcm, wavelength], dtype=object)))
  assert f"{lcm:.3e}" == "7.058e+51"
