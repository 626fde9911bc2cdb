"""Positions are int32: what would wrap is refused, by name, before anything compiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import config, resolve, rope
from rope_jax.data.arrange import POSE_REACH, Arrange
from rope_jax.data.batches import Batches
from rope_jax.model.generate import Generator
from rope_jax.rope import positions
from rope_jax.rope.limits import MOST_TOKENS

BASE = rope.base(head_dim=16, theta=1e4, original_context=4096)
SIZES = dict(length=16, context=64)
KEY = jax.random.key(0)
TOO_FAR = [2**31, 2**32 - 1, 2**33 + 5, 2**63 - 1]
TYPES = (int, np.int64, np.uint32, np.uint64, list, np.array)


def of_type(kind, number):
  """The number in a container or width of this kind, or None where it does not fit."""
  if kind is int:
    return number
  if kind is list:
    return [0, number]
  if kind is np.array:
    return np.array([[0, number]])
  return kind([number]) if np.iinfo(kind).min <= number <= np.iinfo(kind).max else None


@pytest.mark.parametrize("kind", TYPES, ids=lambda k: k.__name__)
def test_positions_that_int32_cannot_hold_are_refused(kind):
  given = [(n, of_type(kind, n)) for n in TOO_FAR]
  for number, p in given:
    if p is not None:
      with pytest.raises(ValueError, match=rf"positions must be .*2\^31 - 1.*got {number}$"):
        rope.cos_sin(BASE, p)
  last = rope.cos_sin(BASE, of_type(kind, MOST_TOKENS))[0]  # the last that there is
  expected = np.cos(MOST_TOKENS * BASE.inv_freq)
  np.testing.assert_allclose(last.reshape(-1, 8)[-1], expected, atol=1e-5)


@pytest.mark.parametrize("p", [-1, [3, -1], np.int64([-5]), jnp.array([-1]), np.int8([-1])])
def test_negative_positions_are_refused(p):
  with pytest.raises(ValueError, match=r"positions must be from 0 .*got -\d$"):
    rope.cos_sin(BASE, p)


def test_wide_positions_on_the_device_and_numbers_past_64_bits_are_refused():
  for p in (jnp.array([2**31], jnp.uint32), np.array([2**64 - 1], np.uint64), [10**30]):
    with pytest.raises(ValueError, match="positions must be from 0"):
      rope.cos_sin(BASE, p)


def test_positions_whose_values_are_not_known_are_taken():
  for f in (jax.jit(rope.cos_sin), functools.partial(jax.eval_shape, rope.cos_sin)):
    assert f(BASE, jnp.arange(4))[0].shape == (4, 8)
  assert jax.jit(lambda r, p: rope.cos_sin(r, [p, 3])[0])(BASE, 1).shape == (2, 8)
  assert rope.cos_sin(BASE, np.zeros((0, 3), int))[0].shape == (0, 3, 8)


CONTEXTS = dict(
  base=lambda n: rope.base(head_dim=16, theta=1e4, original_context=n),
  rebase=lambda n: rope.rebase(BASE, n),
  pi=lambda n: rope.pi(BASE, n / 4096),
  proportional=lambda n: rope.proportional(BASE, n / 4096),
  dynamic_ntk=lambda n: rope.dynamic_ntk(BASE, 1.0, seq_len=n),
  dynamic_yarn=lambda n: rope.dynamic_yarn(BASE, seq_len=n),
  longrope=lambda n: rope.longrope(BASE, 2.0, seq_len=n, long_factor=np.ones(8)),
  start_tokens=lambda n: rope.longrope(
    BASE, 2.0, seq_len=9, long_factor=np.ones(8), start_tokens=n
  ),
  clex=lambda n: rope.clex(BASE, seq_len=n),
  max_factor=lambda n: rope.clex(BASE, seq_len=9, max_factor=n // 4096, time_step=1.0),
  hf=lambda n: rope.from_hf(dict(max_position_embeddings=n, head_dim=16, rope_theta=1e4)),
  config=lambda n: resolve.rope(with_rope(original_context=4096, context=n, scaling="pi")),
  original=lambda n: resolve.rope(with_rope(original_context=n, context=n)),
  seq_len=lambda n: resolve.rope(config.base(), seq_len=n),
  describe=lambda n: resolve.describe(config.base(), n),
)


def with_rope(**keys):
  c = config.base()
  c.rope.update(keys)
  return c


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_past_int32_are_refused(name):
  for n in (2**31, 2**40):
    with pytest.raises(ValueError, match=r"2\^31 - 1") as error:
      CONTEXTS[name](n)
    assert "\n" not in str(error.value)
  if name not in ("seq_len", "describe"):
    CONTEXTS[name](MOST_TOKENS - MOST_TOKENS % 4096)


def test_dprope_counts_through_no_more_than_it_can():
  with pytest.raises(ValueError, match="dprope: a context of .* at most 4,194,304 tokens"):
    rope.dprope(BASE, 2**22 / 4096 + 1)


def test_a_context_that_is_refused_is_named_by_its_key():
  for key in ("original_context", "context"):
    with pytest.raises(ValueError, match=rf"config\.rope\.{key}=2147483648: expected"):
      resolve.rope(with_rope(**{key: 2**31}))
  with pytest.raises(ValueError, match="seq_len"):
    resolve.rope(config.base(), seq_len=2**31)
  for key in ("max_position_embeddings", "original_max_position_embeddings"):
    lengths = dict(max_position_embeddings=4096) | {key: 2**31}
    with pytest.raises(ValueError, match=f"^{key}=2147483648 must be"):
      rope.from_hf(dict(lengths, head_dim=16, rope_theta=1e4))


DRAWN = dict(
  pose=lambda n: positions.pose(KEY, length=16, context=n),
  randomised=lambda n: positions.randomised(KEY, length=16, context=n),
  # g times the original context, where that does not divide the context.
  e2_llm=lambda n: positions.e2_llm(KEY, length=16, context=n, original_context=2**30),
  clex=lambda n: positions.clex(KEY, jnp.int32(1), length=16, max_factor=-(-n // 16)),
  clex_time=lambda n: positions.clex_time(KEY, max_factor=n),
)
ARRANGED = dict(
  pose_run=lambda n: Arrange("pose", seed=0, length=16, context=n - 1, original_context=16),
  pose_text=lambda n: Arrange(
    "pose", seed=0, length=n // POSE_REACH, context=n // 2, original_context=16
  ),
  clex_run=lambda n: Arrange(
    "clex", seed=0, length=16, context=64, original_context=16, max_factor=n // 16
  ),
  e2_llm_run=lambda n: Arrange("e2_llm", seed=0, length=16, context=n, original_context=2**30),
)


@pytest.mark.parametrize("name", DRAWN | ARRANGED)
def test_positions_that_could_be_drawn_past_int32_are_refused(name):
  in_run = r"^config\.data\.positions=.*" if name in ARRANGED else ""
  with pytest.raises(ValueError, match=in_run + r"2\^31 - 1"):
    (DRAWN | ARRANGED)[name](2**31)


def test_positions_are_drawn_up_to_the_last():
  index, drawn = jax.jit(lambda k: positions.pose(k, length=16, context=MOST_TOKENS))(KEY)
  assert (np.diff(np.int64(drawn)) > 0).all() and (np.asarray(index) == np.arange(16)).all()
  keys = jax.random.split(KEY, 200)
  draw = functools.partial(positions.e2_llm, length=16, context=2**31 - 2**10)
  whole, _ = jax.jit(jax.vmap(functools.partial(draw, original_context=2**10)))(keys)
  assert whole.min() >= 0 and whole.max() < 2**10
  times = jax.vmap(lambda k: positions.clex_time(k, max_factor=MOST_TOKENS - 1))(keys)
  assert times.min() >= 1


@pytest.mark.parametrize("kind", ["randomised", "e2_llm"])
def test_sequences_past_32_bits_have_positions_of_their_own(kind):
  arrange = Arrange(kind, seed=3, original_context=16, **SIZES)
  batch = dict(positions=np.broadcast_to(np.arange(16), (1, 16)))

  def drawn(number):
    out = arrange(batch, 0, np.array([number]))
    return out["positions"] + out.get("fractions", 0)

  numbers = [5, 2**31 + 5, 2**32 + 5, 2**33 + 5, 2**40 + 5, 2**32 - 1, 2**32]
  assert len({drawn(n).tobytes() for n in numbers}) == len(numbers)
  np.testing.assert_array_equal(drawn(2**40 + 5), drawn(2**40 + 5))


def test_sequences_below_32_bits_have_the_positions_that_they_had():
  arrange = Arrange("randomised", seed=3, original_context=16, **SIZES)
  batch = dict(positions=np.broadcast_to(np.arange(16), (3, 16)))
  numbers = [0, 12_345, 2**31 - 1]
  got = arrange(batch, 0, np.array(numbers))["positions"]
  run = jax.random.fold_in(jax.random.key(3), 1)
  for row, n in zip(got, numbers):
    np.testing.assert_array_equal(row, positions.randomised(jax.random.fold_in(run, n), **SIZES))
  clex = Arrange("clex", seed=3, original_context=16, max_factor=1000, **SIZES)
  key = jax.random.fold_in(jax.random.fold_in(run, 2**31 - 1), 77)
  assert clex.time(77) == positions.clex_time(key, max_factor=1000)
  assert len({clex.time(n) for n in (77, 2**32 + 77, 2**33 + 77)}) == 3


def test_sequences_and_generated_texts_longer_than_int32_are_refused():
  with pytest.raises(ValueError, match=r"config\.data\.length .*2\^31 - 1"):
    Batches(None, length=2**31, batch_size=1, packing="document", seed=0)
  g = Generator(tiny.model(), None, None, depends_on_length=False)
  for most in (2**31 - 3, MOST_TOKENS, 2**40):
    with pytest.raises(ValueError, match=r"max_new_tokens.*2\^31 - 1"):
      g([np.arange(4)], most)
  with pytest.raises(ValueError, match=r"cache.*2\^31 - 1"):
    g._sizes(4, MOST_TOKENS)


FREQUENCIES = dict(
  fast=lambda: rope.longrope(BASE, 2.0, seq_len=9000, long_factor=[1e-30] * 8),
  infinite=lambda: rope.longrope(BASE, 2.0, seq_len=9000, long_factor=[5e-324] * 8),
)


@pytest.mark.parametrize("name", FREQUENCIES)
def test_frequencies_too_fast_to_be_exact_are_refused(name):
  with np.errstate(over="ignore"), pytest.raises(ValueError, match="longrope: frequencies must be"):
    FREQUENCIES[name]()


@pytest.mark.parametrize("turns", [1.0, 1.25, 3.5, 300.75])
def test_pairs_that_turn_more_than_once_a_token_are_exact(turns):
  inv_freq = np.full(8, 2 * np.pi * turns)
  r, p = BASE.apply("fast", inv_freq), np.array([0, 1, 3, 2**16, 2_097_151, 2_097_152])
  for got, expected in zip(jax.jit(rope.cos_sin)(r, p), (np.cos, np.sin)):
    angle = 2 * np.pi * (p[:, None] * turns % 1).repeat(8, 1)
    np.testing.assert_allclose(got, expected(angle), atol=1e-5)


@pytest.mark.parametrize("slow", [1e-30, 1e-45, 1e-300, 5e-324, 0.0])
def test_pairs_slower_than_float32_can_say_stand_still(slow):
  r = BASE.apply("slow", np.array([1.0] * 4 + [slow] * 4))
  for x in (r, rope.resonance(r)):
    cos, sin = jax.jit(rope.cos_sin)(x, np.array([MOST_TOKENS]))
    assert (cos[0, 4:] == 1).all() and (np.abs(sin[0, 4:]) < 1e-20).all()
    assert np.isfinite(cos).all() and np.isfinite(sin).all()


@pytest.mark.parametrize("wavelength", [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**60])
def test_periods_that_no_position_reaches_are_exact(wavelength):
  r = rope.resonance(BASE.apply("slow", np.full(8, 2 * np.pi / wavelength)))
  p = np.array([1, 2**30, MOST_TOKENS])
  cos, sin = jax.jit(rope.cos_sin)(r, p)
  angle = p[:, None] / wavelength * 2 * np.pi
  np.testing.assert_allclose(cos, np.cos(angle).repeat(8, 1), atol=1e-6)
  np.testing.assert_allclose(sin, np.sin(angle).repeat(8, 1), atol=1e-6)


@pytest.mark.parametrize("theta", [1e30, 1e300])
def test_enormous_bases_are_exact(theta):
  r = rope.base(head_dim=16, theta=theta, original_context=4096)
  for x in (r, rope.pi(r, 512.0), rope.resonance(r)):
    cos, sin = jax.jit(rope.cos_sin)(x, np.array([2_097_152]))
    np.testing.assert_allclose(cos[0], np.cos(2_097_152 * x.inv_freq), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(2_097_152 * x.inv_freq), atol=1e-6)


def test_one_pair_is_exact():
  r = rope.pi(rope.base(head_dim=2, theta=1e4, original_context=4096), 512.0)
  cos, _ = jax.jit(rope.cos_sin)(r, np.array([2_097_152]))
  np.testing.assert_allclose(cos[0], np.cos(2_097_152 / 512), atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-46, 1e39, np.inf, np.nan, -1.0])
def test_attention_scales_that_float32_cannot_hold_are_refused(scale):
  with pytest.raises(ValueError, match="attention"):
    rope.yarn(BASE, 2.0, attention_factor=scale)
  with pytest.raises(ValueError, match="attention scale"):
    BASE.apply("mine", BASE.inv_freq, scale)


def test_clex_refuses_frequencies_without_a_logarithm_in_float32():
  """Their correction would be NaN, of all pairs."""
  enormous = rope.base(head_dim=16, theta=1e300, original_context=4096)
  for r in (rope.drope(BASE), rope.hope(BASE, rotations=100.0), enormous):
    with pytest.raises(ValueError, match="clex: .*logarithms"):
      rope.clex(r, seq_len=9000)
  r = rope.clex(BASE, seq_len=9000)
  params = rope.clex_init(KEY, 8)
  slow = rope.clex_correct(dataclasses.replace(r), params, max_factor=16, time_step=0.5)
  assert np.isfinite(slow.inv_freq).all()
