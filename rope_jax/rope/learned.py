"""Frequencies with parameters: FoPE's frozen basis mix and CLEX's learned dynamics.

Both fit the hook Rope -> Rope. FoPE draws its coefficients once, on the host, and carries them in
`Rope.mix`. CLEX is a host transform (its value before training, which is NTK-aware) that marks
the rope with a time, and a traced correction `clex_correct` with trained parameters, which a
model applies to the rope it is given before `cos_sin`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.rope.limits import check_tokens
from rope_jax.rope.rotary import TWO_PI, Rope
from rope_jax.rope.scaling import check_length

_MOST_MIXED = 2**26  # numbers of a mix or of a matrix
_MOST_STEPS = 2**20  # of the integration


def fope(
  rope: Rope,
  *,
  kv_heads: int = 1,
  gain: float = 0.3,
  seed: int = 0,
  per_head: bool = True,
  dropped: str = "zero",
) -> Rope:
  """FoPE: each pair turns by a fixed random mix of all frequencies instead of its own alone.

  cos and sin of the kept frequencies are multiplied by I + N, N being Xavier-normal with this
  gain, drawn once and frozen; pairs that turn less than once within L stand still.

  Args:
    rope: frequencies [pairs].
    kv_heads: heads that get a mix of their own.
    gain: of the initialisation; 0.3 to 0.6 in the release.
    seed: of the draw. Release and this library draw from different generators.
    per_head: a mix for each KV head, or one for all.
    dropped: of pairs that stand still, 'zero' has sin = 0 (the paper, vLLM); 'one' has sin = 1
      (the release), a constant turn of 45 degrees that doubles their part of the logits.

  Source: Hua et al. (arXiv 2412.17739), TsinghuaC3I/Fourier-Position-Embedding.
  """
  if seed < 0:
    raise ValueError(f"fope.seed must be 0 or positive, got {seed}")
  if not 0 <= gain < math.inf:
    raise ValueError(f"fope.gain must be 0 or positive, got {gain}")
  if dropped not in ("zero", "one"):
    raise ValueError(f"fope.dropped must be 'zero' or 'one', got {dropped!r}")
  if rope.inv_freq.ndim > 1:
    raise ValueError("fope: apply it before stacking ropes by layer or head")
  if rope.mix is not None:
    raise ValueError("fope: this rope is mixed already")
  numbers = (kv_heads if per_head else 1) * len(rope.inv_freq) ** 2
  if numbers > _MOST_MIXED:
    raise ValueError(
      f"fope: per_head={per_head}, num_kv_heads={kv_heads} and the pairs of head_dim="
      f"{rope.head_dim} make a mix of {numbers:,} numbers: expected at most {_MOST_MIXED:,}"
    )
  kept = rope.inv_freq > TWO_PI / rope.original_context
  n, pairs = int(kept.sum()), len(kept)
  rng = np.random.default_rng(seed)
  heads = (kv_heads,) if per_head else ()
  both = []
  for _ in ("cos", "sin"):
    mix = np.zeros((*heads, pairs, pairs)) + np.eye(pairs)
    # Xavier-normal: a standard deviation of gain sqrt(2 / (fan in + fan out)).
    noise = rng.normal(size=(*heads, n, n)) * gain / math.sqrt(max(n, 1))
    mix[..., :n, :n] += noise
    both.append(mix)
  if not np.all(kept[:n]):
    raise ValueError("fope: needs frequencies that fall from pair to pair")
  offset = np.where(kept, 0.0, 1.0 if dropped == "one" else 0.0)
  options = dict(gain=gain, seed=seed, per_head=per_head, dropped=dropped)
  out = rope.apply("fope", np.where(kept, rope.inv_freq, 0.0), **options)
  return dataclasses.replace(out, mix=(both[0], both[1], offset))


def clex(
  rope: Rope,
  *,
  seq_len: int,
  max_factor: int = 16,
  param_factor: int = 1,
  activation: str = "tanh",
  time_step: float = 0.01,
) -> Rope:
  """CLEX before training, at t = ceil(seq_len / L) up to max_factor: NTK-aware with alpha 2 t - 1.

  Training adds a learned correction, the solution of an ordinary differential equation in t; see
  `clex_correct`. Lengths past max_factor L tokens use the frequencies of max_factor.

  Args:
    rope: base frequencies.
    seq_len: tokens of the sequence.
    max_factor: largest t, in training and after.
    param_factor, activation, time_step: of the correction. The defaults are ours.

  Source: Chen et al. (arXiv 2310.16450), DAMO-NLP-SG/CLEX `clex_layer.py`, whose base has
  alpha = 2 t - 1 where other NTK implementations have t. Its scaling of attention by the logarithm
  of the length, an option that its 7B config turns off, is not here.
  """
  check_length("clex", seq_len)
  if max_factor < 1 or param_factor < 1:
    raise ValueError(
      f"clex.max_factor={max_factor} and clex.param_factor={param_factor} must be at least 1"
    )
  if activation not in CLEX_ACTIVATIONS:
    raise ValueError(f"clex.activation must be 'tanh' or 'silu', got {activation!r}")
  if not 0 < time_step <= 1:
    raise ValueError(f"clex.time_step must be in (0, 1], got {time_step}")
  check_tokens("clex: max_factor times original_context", max_factor * rope.original_context)
  if (max_factor - 1) / time_step > _MOST_STEPS:
    raise ValueError(
      f"clex.max_factor={max_factor} in steps of clex.time_step={time_step} must be at most "
      f"{_MOST_STEPS:,} steps"
    )
  if (numbers := rope.rotary_dim**2 * param_factor) > _MOST_MIXED:
    raise ValueError(
      f"clex.param_factor={param_factor} makes matrices of {numbers:,} numbers: expected at most "
      f"{_MOST_MIXED:,}"
    )
  t = min(math.ceil(seq_len / rope.original_context), max_factor)
  options = dict(max_factor=max_factor, param_factor=param_factor)
  options |= dict(activation=activation, time_step=time_step)
  exponents = _clex_exponents(rope)
  slowest = rope.inv_freq * float(2 * max_factor - 1) ** -exponents
  if np.any(slowest < np.finfo(np.float32).tiny):
    raise ValueError(
      "clex: learns from the logarithms of frequencies in float32, which must be at least "
      f"{np.finfo(np.float32).tiny:.3g} at max_factor={max_factor}, got {slowest.min():g}"
    )
  out = rope.apply(
    "clex", rope.inv_freq * float(2 * t - 1) ** -exponents, seq_len=seq_len, **options
  )
  return dataclasses.replace(out, time=float(t))


CLEX_ACTIVATIONS = dict(tanh=jnp.tanh, silu=jax.nn.silu)


def clex_init(key: jax.Array, pairs: int, param_factor: int = 1) -> dict:
  """Initial float32 parameters {'up': [pairs, 2 pairs k], 'down': zeros [2 pairs k, pairs]}.

  `up` is uniform within 1/sqrt of its second dimension, as PyTorch's kaiming_uniform_(a=sqrt 5)
  takes the fan of a matrix that is multiplied from the left.
  """
  width = 2 * pairs * param_factor
  bound = 1 / math.sqrt(width)
  up = jax.random.uniform(key, (pairs, width), minval=-bound, maxval=bound)
  return dict(up=up, down=jnp.zeros((width, pairs)))


def clex_correct(
  rope: Rope, params: dict, *, max_factor: int, activation: str = "tanh", time_step: float = 0.01
) -> Rope:
  """The rope of `clex` with its trained correction: inv_freq times exp c(t).

  dc/dt = act((2 ln f(t) + c) up) down, c(1) = 0, f(t) being the NTK-aware frequencies: the
  release integrates c + ln f together; here the known part is exact and only c is integrated, by
  RK4 in a fixed number of steps up to t, so that t is data and never recompiles.

  Args:
    rope: made by `clex`, possibly inside jit.
    params: as by `clex_init`.
    max_factor, activation, time_step: as given to `clex`.

  Returns:
    A rope with traced frequencies, the same as before where `down` is zero.
  """
  if rope.time is None:
    raise ValueError("clex_correct: this rope has no time; it was not made by clex")
  t = jnp.asarray(rope.time, jnp.float32)
  inv_freq = jnp.asarray(rope.inv_freq, jnp.float32)
  exponents = jnp.asarray(_clex_exponents(rope), jnp.float32)
  base = jnp.log(inv_freq) + exponents * jnp.log(2 * t - 1)
  act = CLEX_ACTIVATIONS[activation]
  # Accelerators multiply float32 in bfloat16 unless they are told not to.
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

  def slope(time, c):
    known = base - exponents * jnp.log(2 * time - 1)
    return product(act(product(2 * known + c, params["up"])), params["down"])

  steps = max(1, math.ceil((max_factor - 1) / time_step))
  h = (t - 1) / steps

  def rk4(c, i):
    time = 1 + i * h
    k1 = slope(time, c)
    k2 = slope(time + h / 2, c + h / 2 * k1)
    k3 = slope(time + h / 2, c + h / 2 * k2)
    k4 = slope(time + h, c + h * k3)
    return c + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

  c, _ = jax.lax.scan(rk4, jnp.zeros_like(inv_freq), jnp.arange(steps, dtype=jnp.float32))
  return rope.with_inv_freq(inv_freq * jnp.exp(c))


def _clex_exponents(rope: Rope) -> np.ndarray:
  """2i / (d - 2): the power of alpha by which NTK-aware scaling divides each frequency."""
  if rope.rotary_dim < 4:
    raise ValueError(f"clex needs at least 4 rotated channels, got {rope.rotary_dim}")
  return np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / (rope.rotary_dim - 2)
