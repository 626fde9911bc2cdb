"""Cosines and sines at far positions, of every method, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import ropes

from rope_jax import config, resolve, rope

LIMIT = 1e-5  # of the attention scale
LAST = 2**31 - 1

_alone = jax.jit(rope.cos_sin)
_vmapped = jax.jit(jax.vmap(rope.cos_sin, in_axes=(0, None)))


def run(seed: int, count: int) -> dict:
  """The largest errors of random ropes at `count` random positions each and at the known ones.

  Of each method there are count / 16 ropes without resonance, and as many with it.

  Raises:
    AssertionError: if an error is 1e-5 of the attention scale or more, an angle of a resonance rope
      does not repeat bit for bit, or frequencies traced in float32 are off by more than they say.
  """
  rng, worst = np.random.default_rng(seed), Worst()
  for method in rope.SCALINGS:
    # DPRoPE goes through every position of its context, which is for the long runs.
    longest = ropes.LONGEST if method != "dprope" or count > 100 else 2**17
    for resonance in (False, True)[: 1 if method == "clex" else 2]:  # the config refuses clex's
      for _ in range(max(1, count // 16)):
        r = ropes.draw(rng, method, longest)
        r = rope.resonance(r) if resonance else r
        r = ropes.stacked(rng, r)
        p = positions(rng, r, count)
        worst.see(r, p, method)
        assert_repeats(rng, r)
    worst.see(configured(method), positions(rng, ropes.base(rng), count), f"config of {method}")
  return dict(methods=len(rope.SCALINGS)) | worst.figures()


def positions(rng: np.random.Generator, r: rope.Rope, count: int) -> np.ndarray:
  """The known ones, and `count` random ones below them; the last is 2^31 - 1."""
  known = [0, 1, r.original_context - 1, r.original_context, r.context - 1, 2**16, 2**20]
  known += [ropes.LONGEST - 1, ropes.LONGEST]
  return np.concatenate([known, rng.integers(0, ropes.LONGEST, count), [LAST]])


class Worst:
  """The largest errors so far, and where they were."""

  def __init__(self):
    self.ropes, self.positions = 0, 0
    self.largest, self.at, self.method, self.last = 0.0, 0, "", 0.0

  def see(self, r: rope.Rope, p: np.ndarray, method: str) -> None:
    """Takes in the errors of a rope at these positions, every way that a rope reaches a model."""
    self.ropes, self.positions = self.ropes + 1, self.positions + len(p)
    for way in (alone, vmapped, scanned):
      errors = way(r, p)
      assert errors.max() < LIMIT, f"{way.__name__}: {method} is off by {errors.max()}: {r}"
      far = errors[:-1]
      self.last = max(self.last, float(errors[-1]))
      if far.max() > self.largest:
        self.largest, self.at, self.method = float(far.max()), int(p[far.argmax()]), method
    assert_traced_are_as_exact_as_they_say(r, p)

  def figures(self) -> dict:
    return dict(
      ropes=self.ropes,
      positions=self.positions,
      largest_error=float(f"{self.largest:.3g}"),
      at_tokens=self.at,
      of=self.method,
      largest_error_at_2_31=float(f"{self.last:.3g}"),
    )


# ---- What float64 says.


def exact(r: rope.Rope, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """cos, sin [positions, ..., pairs] of a host rope in float64."""
  angle = p.reshape(-1, *[1] * r.inv_freq.ndim) * r.inv_freq
  cos, sin = np.cos(angle), np.sin(angle)
  if r.mix is not None:
    mix_cos, mix_sin, offset = r.mix
    cos, sin = (np.einsum("np,...pq->n...q", *x) for x in ((cos, mix_cos), (sin, mix_sin)))
    sin = sin + offset
  scale = np.asarray(r.attention_scale)[..., None]
  cos, sin = cos * scale, sin * scale
  if r.short is not None:
    early = (p < r.start_tokens).reshape(-1, *[1] * (cos.ndim - 1))
    others = [x.reshape(len(p), *[1] * (cos.ndim - 2), -1) for x in exact(r.short, p)]
    cos, sin = (np.where(early, a, b) for a, b in zip(others, (cos, sin)))
  return cos, sin


def error(r: rope.Rope, p: np.ndarray, got) -> np.ndarray:
  """[positions]: the largest error of cos or sin at each, in units of the attention scale."""
  far = [
    np.abs(np.asarray(a, np.float64).reshape(len(p), -1) - b.reshape(len(p), -1)).max(1)
    for a, b in zip(got, exact(r, p))
  ]
  return np.maximum(*far) / np.max(r.attention_scale)


# ---- The ways of a rope into a model.


def alone(r: rope.Rope, p: np.ndarray) -> np.ndarray:
  """As an argument of jit."""
  got = _alone(r, p)
  assert all(x.dtype == jnp.float32 for x in got)
  return error(r, p, got)


def vmapped(r: rope.Rope, p: np.ndarray) -> np.ndarray:
  """As one of several candidates of a search."""
  other = dataclasses.replace(r, inv_freq=r.inv_freq * 0.75, period=None)
  cos, sin = _vmapped(jax.tree.map(lambda *x: np.stack(x), r, other), p)
  return np.maximum(*(error(x, p, (cos[i], sin[i])) for i, x in enumerate((r, other))))


@jax.jit
def _scanned(r: rope.Rope, p):
  layers = rope.per_layer(r, ropes.LAYERS)
  return jax.lax.scan(lambda _, layer: (None, rope.cos_sin(layer, p)), None, layers)[1]


def scanned(r: rope.Rope, p: np.ndarray) -> np.ndarray:
  """Layer by layer, inside the loop of a model."""
  got = [np.asarray(x) for x in _scanned(r, p)]
  if r.inv_freq.ndim == 2:
    return error(r, p, [np.moveaxis(x, 0, 1) for x in got])
  assert all((x == x[:1]).all() for x in got)
  return error(r, p, [x[0] for x in got])


def configured(method: str) -> rope.Rope:
  """The method of a config for 2,097,152 tokens, as a run resolves it."""
  c = config.base()
  c.model.head_dim = 16
  c.rope.update(scaling=method, original_context=4096, context=ropes.LONGEST)
  options = c.rope.get(method, {})
  if "long_factor" in options:
    options.long_factor = tuple(np.linspace(1.0, 512.0, 8))
  if method == "cope":
    options.pairs = 4
  if method == "longrope2":
    options.critical = 5
  return resolve.rope(c)


# ---- What is not a matter of 1e-5.


@jax.jit
def _traced(r: rope.Rope, inv_freq, p):
  return rope.cos_sin(r.with_inv_freq(inv_freq), p)


def assert_traced_are_as_exact_as_they_say(r: rope.Rope, p: np.ndarray) -> None:
  """`with_inv_freq`: the angles of a frequency that is off by a relative 1e-7."""
  if r.inv_freq.ndim > 1 or r.mix is not None or r.short is not None:
    return
  inv_freq = r.inv_freq.astype(np.float32)
  cos, sin = (np.asarray(x, np.float64) for x in _traced(r, inv_freq, p))
  angle = p[:, None] * inv_freq.astype(np.float64)
  off = np.abs((np.arctan2(sin, cos) - angle + np.pi) % (2 * np.pi) - np.pi)
  assert (off < 1e-7 * angle + 1e-6).all(), f"traced frequencies of {r}"


def assert_repeats(rng: np.random.Generator, r: rope.Rope) -> None:
  """Pairs of a resonance rope are the same, bit for bit, any number of periods later."""
  if r.period is None or r.inv_freq.ndim > 1 or r.mix is not None or r.short is not None:
    return
  period = np.where(r.period > 0, r.period, LAST).astype(np.int64)
  near = rng.integers(0, period)
  far = near + period * rng.integers(0, (LAST - near) // period + 1)
  for a, b in zip(_alone(r, near), _alone(r, far)):
    np.testing.assert_array_equal(np.diag(a), np.diag(b))
