"""Random configs: every valid one builds a rope, every invalid one names its key."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_jax import config, resolve, rope

NUMBER = st.floats(0.1, 8.0)
# Valid values of every option of every method, given the number of pairs and the factor.
OPTIONS = dict(
  ntk_mixed=dict(b=NUMBER),
  ntk_by_parts=dict(ramp=st.sampled_from(["dim", "rotation"]), truncate=st.booleans(),
                    beta_fast=st.floats(8, 64), beta_slow=st.floats(0.1, 4)),
  ntk_by_parts_v1=dict(beta=st.just((1.5, 0.5)), gamma=st.tuples(st.floats(9, 32), NUMBER)),
  yarn=dict(ramp=st.sampled_from(["dim", "rotation"]), truncate=st.booleans(),
            beta_fast=st.floats(8, 64), beta_slow=st.floats(0.1, 4), attention_factor=NUMBER),
  dynamic_yarn=dict(ramp=st.sampled_from(["dim", "rotation"]), truncate=st.booleans(),
                    beta_fast=st.floats(8, 64), beta_slow=st.floats(0.1, 4)),
  llama3=dict(low_freq_factor=st.floats(0.1, 2), high_freq_factor=st.floats(2.1, 8)),
  longrope=dict(start_tokens=st.integers(0, 256), attention=st.sampled_from(["su", "yarn", "1.2"])),
  dynamic_longrope=dict(attention=st.sampled_from(["su", "yarn", "1.2"])),
  longrope2=dict(attention=st.sampled_from(["su", "yarn"])),
  dprope=dict(bins=st.integers(1, 90), threshold=st.floats(0, 1),
              direction=st.sampled_from(["forward", "reverse"]),
              reduction=st.sampled_from(["sum", "mean"])),
  abf=dict(theta=st.floats(1e7, 1e9)),
  power=dict(exponent=st.floats(0, 4)),
  truncated=dict(cutoff=st.integers(0, 10_000)),
  proportional=dict(proportion=st.floats(0.01, 1)),
  cope=dict(pairs=st.integers(1, 4), hard=st.booleans()),
  hope=dict(rotations=NUMBER),
  fope=dict(gain=st.floats(0, 2), per_head=st.booleans(), seed=st.integers(0, 9)),
  clex=dict(max_factor=st.integers(1, 64), time_step=st.floats(0.01, 1)),
)  # fmt: skip
FALLS = set(rope.SCALINGS) - {"dprope", "fope"}  # frequencies do not rise from pair to pair
# For each method, options that it must refuse, with the key that the error names.
REFUSED = dict(
  ntk_mixed=("b", st.floats(-9, 0)),
  ntk_by_parts=("beta_slow", st.floats(-9, 0)),
  ntk_by_parts_v1=("gamma", st.tuples(NUMBER)),
  yarn=("attention_factor", st.floats(-9, 0)),
  dynamic_yarn=("beta_fast", st.floats(0, 0.9)),
  llama3=("high_freq_factor", st.floats(-9, 1)),
  longrope=("long_factor", st.lists(NUMBER, min_size=1, max_size=3).map(tuple)),
  dynamic_longrope=("long_factor", st.lists(NUMBER, min_size=1, max_size=3).map(tuple)),
  longrope2=("critical", st.integers(-9, -1) | st.integers(64, 99)),
  dprope=("interpolated_dims", st.integers(129, 999)),
  abf=("theta", st.floats(-9, 1)),
  power=("exponent", st.floats(-9, -0.1)),
  truncated=("cutoff", st.integers(-9, -1)),
  proportional=("proportion", st.floats(-9, 0) | st.floats(1.01, 9)),
  cope=("pairs", st.integers(-9, 0) | st.integers(65, 99)),
  hope=("rotations", st.floats(-9, 0)),
  fope=("gain", st.floats(-9, -0.1)),
  clex=("time_step", st.floats(-9, 0) | st.floats(1.01, 9)),
)
_BY_FACTOR = ("pi", "ntk", "ntk_critical", "ntk_mixed", "ntk_by_parts", "ntk_by_parts_v1", "yarn")
IDENTITY = (*_BY_FACTOR, "llama3", "dprope", "dynamic_ntk", "longrope", "dynamic_longrope")


def test_every_method_with_options_is_drawn_and_refused():
  c = config.base()
  with_options = {name for name in rope.SCALINGS if name in c.rope}
  assert set(OPTIONS) == set(REFUSED) == with_options, (
    "a row in OPTIONS and one in REFUSED for each"
  )


@st.composite
def configs(draw, methods=tuple(rope.SCALINGS), options=OPTIONS):
  c = config.base()
  c.model.head_dim = 2 * draw(st.integers(8, 64))
  c.rope.theta = draw(st.floats(100.0, 1e7))
  c.rope.original_context = draw(st.integers(64, 4096))
  factor = draw(st.floats(1.5, 64))
  c.rope.context = round(c.rope.original_context * factor)
  c.rope.scaling = draw(st.sampled_from(methods))
  for key, values in options.get(c.rope.scaling, {}).items():
    c.rope[c.rope.scaling][key] = draw(values)
  if "longrope" in c.rope.scaling and c.rope.scaling != "longrope2":
    steps = draw(st.lists(st.floats(0, 1), min_size=64, max_size=64))[: c.model.head_dim // 2]
    c.rope[c.rope.scaling].long_factor = tuple(1 + np.cumsum(steps))
  return c


@settings(max_examples=300, deadline=None, derandomize=True)
@given(configs(), st.booleans(), st.integers(1, 100_000))
def test_every_valid_config_builds_a_rope(c, resonance, seq_len):
  c.rope.resonance = resonance and c.rope.scaling != "clex"  # which refuses it
  if c.rope.scaling == "longrope2":  # its tail starts at the critical pair, if there is one
    turning = rope.critical_pair(resolve.base(c))
    if not 0 < turning < c.model.head_dim // 2:
      with pytest.raises(ValueError, match="longrope2.critical"):
        resolve.rope(c)
      return
  r = resolve.rope(c, seq_len)
  assert r.inv_freq.shape[-1] == c.model.head_dim // 2
  assert np.isfinite(r.inv_freq).all() and (r.inv_freq >= 0).all()
  # Rounding a wavelength to whole tokens can only raise a frequency to 2 pi / 6.
  assert r.inv_freq.max() <= (2 * np.pi / 6 if c.rope.resonance else 1.0) + 1e-9
  assert r.attention_scale > 0 and r.context == c.rope.context
  if c.rope.scaling in FALLS:
    assert (np.diff(r.inv_freq) <= 1e-15).all()
  described = resolve.describe(c, seq_len)
  assert len(described["inv_freq"]) == c.model.head_dim // 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(configs(methods=tuple(REFUSED), options={}), st.data())
def test_every_invalid_config_names_its_key(c, data):
  method = c.rope.scaling
  key, values = REFUSED[method]
  c.rope[method][key] = data.draw(values)
  with pytest.raises(ValueError, match=key):
    resolve.rope(c)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
  configs(methods=("pi", "yarn")),
  st.sampled_from(
    [("theta", st.floats(-9, 1)), ("original_context", st.integers(-9, 0)),
     ("context", st.integers(-9, 60)), ("factor", st.floats(-9, 0.99)),
     ("partial_rotary_factor", st.floats(-9, 0) | st.floats(1.01, 9)),
     ("scaling", st.text(max_size=5)), ("phase", st.text(max_size=5))]
  ),
  st.data(),
)  # fmt: skip
def test_every_invalid_shape_names_its_key(c, which, data):
  key, values = which
  c.rope[key] = data.draw(values)
  with pytest.raises(ValueError, match=key):
    resolve.rope(c)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configs(methods=IDENTITY))
def test_factor_one_is_the_identity(c):
  method, base = c.rope.scaling, resolve.base(c)
  options = {k: c.rope[method][k] for k in config.method_options(rope.SCALINGS[method])}
  options |= {k: 0 for k in ("threshold",) if k in options}
  options.pop("attention_factor", None)  # given outright, it holds at any factor
  if method.endswith("longrope"):
    options |= dict(attention="su")
  if method in ("dynamic_ntk", "longrope", "dynamic_longrope"):
    options["seq_len"] = base.original_context
  r = rope.SCALINGS[method](base, 1.0, **options)
  np.testing.assert_allclose(r.inv_freq, base.inv_freq, rtol=1e-12)
  assert r.attention_scale == pytest.approx(1.0)
