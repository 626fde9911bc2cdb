"""Numbers of released code: goldens/released.json names file and commit of each."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rope_jax import rope

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "released.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["method"])
def test_equals_released_code(case):
  r = rope.SCALINGS[case["method"]](rope.base(**case["shape"]), **case["options"])
  np.testing.assert_allclose(r.inv_freq, case["inv_freq"], rtol=1e-9, atol=1e-18)
  np.testing.assert_allclose(r.attention_scale, case["attention_scale"], rtol=1e-12)


def test_resonance_over_yarn_has_the_released_wavelengths():
  r = rope.yarn(rope.base(head_dim=128, theta=1e4, original_context=4096), 16)
  np.testing.assert_array_equal(
    rope.resonance(r).period, GOLDEN["resonance_over_yarn"]["wavelengths"]
  )


@pytest.mark.parametrize("case", GOLDEN["dprope"], ids=lambda c: str(c["bins"]))
def test_dprope_chooses_as_released(case):
  base, s = rope.base(**case["shape"]), case["factor"]
  options = dict(bins=case["bins"], reduction="mean")  # the release's direction is the default
  length = s * case["shape"]["original_context"]
  for r, released in zip((base, rope.pi(base, s)), case["similarity"]):
    ours = rope.disturbance(r, base, length, **options)
    np.testing.assert_allclose(ours, released, rtol=0.02, atol=2e-6)
  chosen = rope.dprope(base, s, **options).inv_freq != base.inv_freq
  gap = np.abs(np.subtract(*case["similarity"]))
  clear = gap > 0.02 * np.max(case["similarity"], axis=0) + 4e-6  # float32 decides the others
  assert clear.sum() >= 12 and 0 < chosen.sum() < 16
  np.testing.assert_array_equal(chosen[clear], np.array(case["interpolated"], bool)[clear])


@pytest.mark.parametrize("case", GOLDEN["clex"], ids=lambda c: c["activation"])
def test_clex_equals_the_released_dynamics_at_every_length(case):
  pairs = case["head_dim"] // 2
  row, column = np.ogrid[:pairs, : 2 * pairs]
  up = 0.3 * np.sin(1 + 3 * row + column)
  row, column = np.ogrid[: 2 * pairs, :pairs]
  params = dict(up=up.astype("f4"), down=(0.02 * np.cos(2 + column + 5 * row)).astype("f4"))
  base = rope.base(head_dim=case["head_dim"], theta=case["theta"], original_context=64)
  options = dict(max_factor=8, activation=case["activation"])
  correct = jax.jit(lambda r: rope.clex_correct(r, params, **options).inv_freq)
  for t, expected in zip(case["times"], case["inv_freq"]):
    r = rope.clex(base, seq_len=t * 64, **options)
    np.testing.assert_allclose(correct(r), expected, rtol=2e-5)
    # Untrained, it is NTK-aware with alpha = 2 t - 1.
    np.testing.assert_allclose(r.inv_freq, rope.ntk(base, 2 * t - 1).inv_freq)
  assert correct._cache_size() == 1  # t is data
  assert (
    np.abs(np.log(np.array(expected) / r.inv_freq)).max() > 0.1
  )  # and the correction is not small
