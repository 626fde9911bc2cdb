"""Far positions: angles are those of float64, and what is made of them is relative."""

import dataclasses
import functools

import angles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ropes
import tiny

from rope_jax import rope
from rope_jax.model import cache, llama
from rope_jax.model.llama import Llama

FAR = ropes.LONGEST
BASE = rope.base(head_dim=16, theta=5e5, original_context=8192)


def test_angles_of_every_method_are_those_of_float64_to_two_million_tokens():
  figures = angles.run(seed=3, count=16)
  assert figures["methods"] == len(rope.SCALINGS)
  assert 0 < figures["largest_error"] < angles.LIMIT
  assert 0 < figures["largest_error_at_2_31"] < angles.LIMIT


def test_an_angle_in_float32_would_be_seen():
  """The comparison can fail: what a float32 product, or one in float32 of a turn, gives."""
  p = np.array([FAR])
  product = jnp.float32(p)[:, None] * jnp.float32(BASE.inv_freq)
  assert angles.error(BASE, p, (jnp.cos(product), jnp.sin(product))) > angles.LIMIT
  other = rope.pi(BASE, 1 + 1e-9)
  assert angles.error(other, p, rope.cos_sin(BASE, p)) > angles.LIMIT


@pytest.mark.parametrize("offset", [0, 1, 7, 1000, 65_536])
def test_scores_at_two_million_tokens_depend_on_the_distance_only(offset):
  q, k = jax.random.normal(jax.random.key(0), (2, 64, 1, 128))
  for r in (
    rope.base(head_dim=128, theta=1e4, original_context=4096),
    rope.yarn(rope.base(head_dim=128, theta=5e5, original_context=8192), 256.0),
    rope.resonance(rope.pi(rope.base(head_dim=128, theta=1e4, original_context=4096), 512.0)),
  ):

    def scores(m, n, r=r):
      a, b = (rope.rotate(x, *(t[None] for t in rope.cos_sin(r, p))) for x, p in ((q, m), (k, n)))
      return np.einsum("ihd,ihd->i", a, b)

    near, far = scores(offset, 0), scores(FAR, FAR - offset)
    assert np.abs(far - near).max() < 1e-4 * np.abs(near).max()
    other = scores(FAR, FAR - offset - 999)  # another distance is another score
    assert np.abs(other - near).max() > 1e-2 * np.abs(near).max()


def test_fractions_and_marked_tokens_at_two_million_tokens_are_exact():
  p, rng = np.array([FAR - 3, FAR - 2, FAR - 1, FAR]), np.random.default_rng(0)
  fractions = np.float32([0.0, 0.25, 0.5, 0.999])
  got = jax.jit(rope.cos_sin)(BASE, p, fractions=fractions)
  assert angles.error(BASE, p + np.float64(fractions), got).max() < angles.LIMIT
  for r in (rope.pi(BASE, 256.0), rope.resonance(rope.yarn(BASE, 256.0))):
    short = rng.random(4) < 0.5
    marked = dataclasses.replace(r, short=BASE, attention_scale=1.0)
    got = jax.jit(rope.cos_sin)(marked, p, short=short)
    plain = dataclasses.replace(marked, short=None)
    for a, far, near in zip(got, angles.exact(plain, p), angles.exact(BASE, p)):
      np.testing.assert_allclose(a, np.where(short[:, None], near, far), atol=angles.LIMIT)


def one_layer(**options):
  m = tiny.model(num_layers=1, vocab_size=13, **options)
  return m, tiny.variables(m)


@functools.partial(jax.jit, static_argnums=0)
def hidden(m: Llama, v, r, tokens, first: int):
  """Of the last token, the others standing before it from position `first` on."""
  return m.apply(v, tokens, r, positions_BxL=first + jnp.arange(tokens.shape[1])[None])[0, -1]


@functools.partial(jax.jit, static_argnums=0)
def cached(m: Llama, v, r, tokens, state):
  return m.apply(v, tokens, r, cache=state)


def test_a_model_in_bfloat16_has_angles_in_float32(monkeypatch):
  seen = []
  rotate = llama.rope_lib.rotate_channels

  def watched(x, cos, sin):
    seen.append((x.dtype, cos.dtype, sin.dtype))
    return rotate(x, cos, sin)

  monkeypatch.setattr(llama.rope_lib, "rotate_channels", watched)
  m, v = one_layer(dtype="bfloat16")
  tokens = jnp.arange(13)[None]
  near, far = (np.asarray(hidden(m, v, BASE, tokens, n), np.float32) for n in (0, FAR - 12))
  assert set(seen) == {tuple(map(jnp.dtype, ("bfloat16", "float32", "float32")))}
  np.testing.assert_allclose(far, near, atol=0.1)  # bfloat16's own; angles in it would be random


def test_keys_rotated_on_read_at_two_million_tokens_are_those_of_a_fresh_rotation():
  """on_change='rotate': the cache has keys of one rope's time; another reads them."""
  m, v = one_layer()
  before, after = rope.pi(BASE, 128.0), rope.pi(BASE, 256.0)
  first, tokens = FAR - 15, jnp.arange(16)[None] % 13
  # What stands before the first token counts backwards: a cache of 16 places, two million on.
  state = cache.empty(m.config, jnp.array([-first]), 16, rotated=False)
  _, state = cached(m, v, before, tokens[:, :15], state)
  positions = np.asarray(state.positions()[0])
  assert positions[0] == first and positions[-1] == FAR

  keys = np.asarray(state.k[0, 0, :, :15], np.float64)  # [heads, tokens, channels], not rotated
  got = rope.rotate(
    state.k[0, 0].swapaxes(0, 1), *rope.cos_sin(after, state.positions()[0])
  ).swapaxes(0, 1)[:, :15]
  turned = (keys[..., :8] + 1j * keys[..., 8:]) * np.exp(1j * positions[:15, None] * after.inv_freq)
  fresh = np.concatenate([turned.real, turned.imag], -1)
  assert np.abs(got - fresh).max() < 1e-5 * np.abs(keys).max()

  out, _ = cached(m, v, after, tokens[:, 15:], state)
  np.testing.assert_allclose(out[0, 0], hidden(m, v, after, tokens, first), atol=1e-5)
  changed = hidden(m, v, before, tokens, first)
  assert np.abs(out[0, 0] - changed).max() > 1e-3  # the rope does matter


def test_the_mix_of_fope_is_multiplied_in_float32_on_accelerators():
  """They use bfloat16 unless told not to, and cosines would have three digits."""
  for r in (rope.fope(BASE), rope.fope(BASE, per_head=False)):
    text = jax.jit(rope.cos_sin).lower(r, np.arange(4)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("HIGHEST" in line for line in products)
