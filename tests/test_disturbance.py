import numpy as np
import pytest

from rope_jax import rope

LLAMA2 = rope.base(head_dim=128, theta=1e4, original_context=4096)


def chosen(r):
  return np.flatnonzero(r.inv_freq != LLAMA2.inv_freq).tolist()


def pairs(text):
  """'2 4-6' -> [2, 4, 5, 6]."""
  ends = [list(map(int, part.split("-"))) for part in text.split()]
  return [i for e in ends for i in range(e[0], e[-1] + 1)]


def test_histogram_equals_its_definition():
  r = rope.base(head_dim=8, theta=1e4, original_context=64)
  h = rope.angle_histogram(r, 100, bins=12)
  for i, frequency in enumerate(r.inv_freq):
    degrees = np.degrees([m * frequency % (2 * np.pi) for m in range(100)])
    expected = [np.mean((degrees >= 30 * k) & (degrees < 30 * (k + 1))) for k in range(12)]
    np.testing.assert_allclose(h[i], expected, atol=1e-12)
  np.testing.assert_allclose(h.sum(1), 1)
  for bad in (dict(length=0), dict(length=5, bins=0)):
    with pytest.raises(ValueError, match="positive"):
      rope.angle_histogram(r, **bad)


def test_whole_wavelengths_fill_whole_bins():
  """Exactly, where products of floats would fall on either side of an edge."""
  h = rope.angle_histogram(rope.resonance(LLAMA2), 3600)
  for pair, wavelength in ((0, 6), (2, 8), (3, 10), (8, 20)):
    assert np.count_nonzero(h[pair]) == wavelength
    np.testing.assert_allclose(h[pair][h[pair] > 0], 1 / wavelength, atol=1e-3)


def test_selected_pairs_are_the_published_ones():
  by_dims = {
    (2, 80): "2 4-6 9 10 17 28 30 32-44 46-63",
    (4, 64): "10 31-33 35-44 46-63",
  }
  for (factor, dims), expected in by_dims.items():
    r = rope.dprope(LLAMA2, factor, interpolated_dims=dims)
    assert chosen(r) == pairs(expected)
    np.testing.assert_allclose(r.inv_freq[pairs(expected)] * factor, LLAMA2.inv_freq[chosen(r)])
  assert chosen(rope.dprope(LLAMA2, 4)) == pairs("1 2 4 8 10 21 25 28 30-63")
  # The published set at 8k also has pair 3, a tie that float32 breaks the other way.
  assert chosen(rope.dprope(LLAMA2, 2)) == pairs("2 4-6 8-10 15-19 28 30-44 46-63")


@pytest.mark.parametrize(
  # The published ends of the interval, in float32, are within 3% of these.
  "factor, dims, low, high",
  [(2, 80, 4.88e-4, 6.43e-4), (4, 64, 1.50e-3, 2.136e-3)],
)
def test_threshold_and_number_of_dims_are_two_ways_to_say_the_same(factor, dims, low, high):
  expected = chosen(rope.dprope(LLAMA2, factor, interpolated_dims=dims))
  for t in (low * 1.02, high * 0.98):
    assert chosen(rope.dprope(LLAMA2, factor, threshold=t)) == expected
  assert chosen(rope.dprope(LLAMA2, factor, threshold=high * 1.02)) != expected
  mean = rope.dprope(LLAMA2, factor, threshold=low * 1.02 / 360, reduction="mean")
  assert chosen(mean) == expected


def test_direction_changes_the_number_and_not_the_choice():
  r = rope.pi(LLAMA2, 2)
  forward, reverse = (
    rope.disturbance(r, LLAMA2, 8192, direction=d) for d in ("forward", "reverse")
  )
  assert forward.mean() > 3 * reverse.mean()
  for dims in (64, 72, 80):
    a, b = (chosen(rope.dprope(LLAMA2, 2, interpolated_dims=dims, direction=d))
            for d in ("forward", "reverse"))  # fmt: skip
    assert a == b


def test_disturbance_of_nothing_is_nothing():
  assert np.abs(rope.disturbance(LLAMA2, LLAMA2, 4096)).max() < 1e-6


def test_any_transform_can_be_a_candidate():
  best = rope.dprope(LLAMA2, 4, candidates=("pi", "ntk", "yarn"))
  d = {n: rope.disturbance(f(LLAMA2, 4), LLAMA2, 16_384)
       for n, f in (("pi", rope.pi), ("ntk", rope.ntk), ("yarn", rope.yarn))}  # fmt: skip
  d["none"] = rope.disturbance(LLAMA2, LLAMA2, 16_384)
  got = rope.disturbance(best, LLAMA2, 16_384)
  np.testing.assert_allclose(got, np.min(list(d.values()), axis=0), atol=1e-12)
  only_yarn = rope.disturbance(rope.dprope(LLAMA2, 4, candidates=("yarn",)), LLAMA2, 16_384)
  assert got.mean() < only_yarn.mean() < d["yarn"].mean()
  assert best.attention_scale == 1.0

  def mine(r, factor):
    return r.apply("mine", r.inv_freq / factor, factor=factor)

  same = rope.dprope(LLAMA2, 4, candidates=(mine,))
  np.testing.assert_array_equal(same.inv_freq, rope.dprope(LLAMA2, 4).inv_freq)
  assert same.history[-1][1]["candidates"] == ("mine",)
