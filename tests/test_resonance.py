import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_jax import rope

LLAMA2 = rope.base(head_dim=128, theta=1e4, original_context=4096)
SMALL = rope.base(head_dim=64, theta=1e4, original_context=64)


def test_rounds_to_the_published_wavelengths():
  period = rope.resonance(LLAMA2).period.astype(int).tolist()
  assert period[:16] == [6, 7, 8, 10, 11, 13, 15, 17, 20, 23, 26, 31, 35, 41, 47, 54]
  assert len(set(period[:46])) == 46
  small = rope.resonance(SMALL).period.astype(int).tolist()
  assert small[:10] == [6, 8, 11, 15, 20, 26, 35, 47, 63, 84]
  assert small[10:17] == [112, 149, 199, 265, 353, 471, 628]


def test_critical_pair_and_common_period_are_the_published_ones():
  assert rope.critical_pair(LLAMA2) == 46
  assert rope.critical_pair(rope.base(head_dim=128, theta=1e4, original_context=2048)) == 41
  assert f"{rope.common_period(rope.resonance(LLAMA2)):.3e}" == "7.058e+51"
  with pytest.raises(ValueError, match="whole"):
    rope.common_period(LLAMA2)


def test_feature_gap_has_the_published_values_without_and_is_zero_with():
  gap = rope.feature_gap(SMALL, 256)
  published = [0.0708, 0.0796, 0.0752, 0.1277, 0.1094, 0.0076, 0.0596, 0.0625, 0.0496]
  np.testing.assert_allclose(gap[:9], published, atol=5e-5)
  np.testing.assert_allclose(gap[9:13], [0.777, 1.365, 1.813, 2.141], atol=5e-4)
  closed = rope.feature_gap(rope.resonance(SMALL), 256)
  assert (closed[:9] == 0).all()
  np.testing.assert_allclose(closed[9:13], [0.748, 1.346, 1.813, 2.147], atol=5e-4)


def test_feature_gap_equals_its_definition():
  for r in (SMALL, rope.yarn(SMALL, 2.0)):
    angles = np.arange(100)[:, None] * r.inv_freq
    distance = np.abs((angles[64:, None] - angles[None, :64] + np.pi) % (2 * np.pi) - np.pi)
    np.testing.assert_allclose(rope.feature_gap(r, 100), distance.min(1).max(0), atol=1e-9)
  with pytest.raises(ValueError, match="length.*64"):
    rope.feature_gap(SMALL, 64)


def test_angles_repeat_bit_for_bit_after_a_wavelength():
  r = rope.resonance(rope.yarn(LLAMA2, 16.0))
  cos_sin = jax.jit(rope.cos_sin)
  for pair in (0, 7, 20, 33, 45):
    p = int(r.period[pair])
    m = np.arange(min(p, 50), dtype=np.int32)
    for turns in (1, 3, (2**31 - 1) // p - 1):
      for a, b in zip(cos_sin(r, m), cos_sin(r, m + p * turns)):
        np.testing.assert_array_equal(a[:, pair], b[:, pair])
  plain, far = (cos_sin(LLAMA2, np.arange(6, dtype=np.int32) + shift)[1][:, 0] for shift in (0, 6))
  assert jnp.abs(plain - far).max() > 0.1


def test_composes_last_and_only_rounds():
  r = rope.resonance(rope.yarn(LLAMA2, 16))
  assert [name for name, _ in r.history] == ["yarn", "resonance"]
  assert r.history[0][1]["factor"] == 16
  yarn = rope.yarn(LLAMA2, 16)
  np.testing.assert_array_equal(r.period, np.round(yarn.wavelengths))
  assert r.attention_scale == yarn.attention_scale
  # Interpolation by a whole factor: round(s * wavelength), not s * round(wavelength).
  np.testing.assert_array_equal(
    rope.resonance(rope.pi(LLAMA2, 4)).period, np.round(4 * LLAMA2.wavelengths)
  )
  # A transform that comes after has wavelengths of its own again.
  assert rope.power(r).period is None


def test_pairs_that_stand_still_keep_standing():
  r = rope.resonance(rope.hope(LLAMA2))
  assert not r.inv_freq[46:].any() and not r.period[46:].any()


def test_wavelengths_below_half_a_token_are_refused():
  with pytest.raises(ValueError, match="half a token"):
    rope.resonance(LLAMA2.apply("fast", LLAMA2.inv_freq * 20))
