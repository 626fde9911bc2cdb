import json

import jax.numpy as jnp
import numpy as np
import pytest

from rope_jax import factors, rope

LLAMA3 = rope.base(head_dim=128, theta=5e5, original_context=8192)
# The factors shipped for Llama-3 8B (microsoft/nnscaler 1585c15, examples/longrope2).
SHIPPED_HEAD = [1, 1.097906416, 1.205398499, 1.323414747, 1.452985542, 1.595242149]
SHIPPED_TAIL = (
  21.81, 21.87, 21.88, 22.23, 22.28, 22.53, 22.65, 22.73, 22.89, 22.92, 23.18, 23.23, 23.36, 23.42,
  23.47, 23.51, 23.52, 23.75, 23.82, 23.89, 24.06, 24.13, 24.14, 24.3, 24.53, 24.67, 24.75, 24.97,
  25.49, 26.01, 26.05,
)  # fmt: skip


def test_longrope2_has_the_shipped_factors():
  r = rope.longrope2(LLAMA3, 16, seq_len=131_072, critical=33, tail=SHIPPED_TAIL)
  ratio = LLAMA3.inv_freq / r.inv_freq
  np.testing.assert_allclose(ratio[:6], SHIPPED_HEAD, rtol=1e-9)
  np.testing.assert_allclose(ratio[:33], 21.81 ** (np.arange(33) / 33), rtol=1e-12)
  np.testing.assert_allclose(ratio[33:], SHIPPED_TAIL, rtol=1e-12)
  np.testing.assert_allclose(r.attention_scale, 1.143544, atol=1e-6)
  short = rope.longrope2(LLAMA3, 16, seq_len=8192, critical=33, tail=SHIPPED_TAIL)
  np.testing.assert_array_equal(short.inv_freq, LLAMA3.inv_freq)


def test_longrope2_by_default_starts_at_the_theoretical_critical_pair():
  r = rope.longrope2(LLAMA3, 16, seq_len=131_072)
  ratio = LLAMA3.inv_freq / r.inv_freq
  np.testing.assert_allclose(ratio[35:], 16.0)
  assert (ratio[:35] < 16).all() and (np.diff(ratio[:36]) > 0).all()


@pytest.mark.parametrize(
  "factor, length, su, yarn",
  [
    (32, 4096, 1.190238, 1.346574),
    (16, 8192, 1.143544, 1.277259),
    (64, 2048, 1.243163, 1.415888),
    (4, 32_768, 1.064581, 1.138629),
  ],
)
def test_attention_policies_have_the_published_values(factor, length, su, yarn):
  base = rope.base(head_dim=8, theta=1e4, original_context=length)
  for policy, expected in (("su", su), ("yarn", yarn), ("1.25", 1.25), (1.25, 1.25)):
    r = rope.longrope(base, factor, seq_len=1, long_factor=(1.0,) * 4, attention=policy)
    np.testing.assert_allclose(r.attention_scale, expected, atol=1e-6)


def test_start_tokens_keep_the_original_rope():
  base = rope.base(head_dim=16, theta=1e4, original_context=64)
  lists = dict(long_factor=(4.0,) * 8)
  r = rope.longrope(base, 4.0, seq_len=256, start_tokens=5, **lists)
  plain = rope.longrope(base, 4.0, seq_len=256, **lists)
  positions = jnp.arange(256)
  got, scaled, original = (np.stack(rope.cos_sin(x, positions)) for x in (r, plain, base))
  np.testing.assert_array_equal(got[:, :5], original[:, :5])
  np.testing.assert_array_equal(got[:, 5:], scaled[:, 5:])
  assert r.history[-1][1]["start_tokens"] == 5


def test_factors_per_layer_are_frequencies_per_layer():
  rows = np.linspace(1, 4, 16).reshape(2, 8)
  base = rope.base(head_dim=16, theta=1e4, original_context=64)
  r = rope.longrope(base, 4.0, seq_len=256, long_factor=rows, start_tokens=3)
  np.testing.assert_allclose(r.inv_freq, base.inv_freq / rows)
  cos, _ = rope.cos_sin(r, jnp.arange(10))
  assert cos.shape == (10, 2, 8)
  one = rope.longrope(base, 4.0, seq_len=256, long_factor=rows[1], start_tokens=3)
  np.testing.assert_array_equal(cos[:, 1], rope.cos_sin(one, jnp.arange(10))[0])


def test_dynamic_longrope_reaches_the_factors_at_its_target_and_nothing_at_the_original():
  base = rope.base(head_dim=16, theta=1e4, original_context=64)
  full = np.linspace(1, 8, 8)
  for n, expected in ((10, np.ones(8)), (64, np.ones(8)), (512, full)):
    r = rope.dynamic_longrope(base, 8.0, seq_len=n, long_factor=tuple(full))
    np.testing.assert_allclose(base.inv_freq / r.inv_freq, expected)


LISTS = dict(long_factor=[1.0, 2.0, 4.0], short_factor=[1.0, 1.0, 1.5])


@pytest.mark.parametrize(
  "name, text, expected",
  [
    ("a.json", json.dumps(LISTS), LISTS),
    ("a.json", json.dumps(dict(rope_scaling=dict(LISTS, type="longrope"))), LISTS),
    ("a.json", json.dumps(LISTS["long_factor"]), dict(long_factor=LISTS["long_factor"])),
    ("a.csv", "1.0,2.0,4.0", dict(long_factor=LISTS["long_factor"])),
    ("a.csv", "1.0 \n2.0\n4.0\n", dict(long_factor=LISTS["long_factor"])),
    ("a.csv", "1,2,4\n1,3,5\n", dict(long_factor=[[1, 2, 4], [1, 3, 5]])),
  ],
)
def test_factors_are_read_from_json_and_csv(tmp_path, name, text, expected):
  (tmp_path / name).write_text(text)
  got = factors.read(str(tmp_path / name))
  assert set(got) == set(expected)
  for key in got:
    np.testing.assert_array_equal(got[key], expected[key])
    assert isinstance(got[key], tuple)


@pytest.mark.parametrize(
  "name, text",
  [
    ("a.json", "{}"),
    ("a.json", "{"),
    ("a.csv", ""),
    ("a.csv", "1,x"),
    ("no", None),
    ("a.json", "3"),
    ("a.json", "null"),
    ("a.json", '{"long_factor": 3}'),
    ("a.json", '{"long_factor": [1], "attention_factor": 1.7}'),
  ],
)
def test_files_without_factors_are_refused_by_name(tmp_path, name, text):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=f"{name}.*no factors"):
    factors.read(str(tmp_path / name))
