"""Random ropes of every method, with random valid options, up to two million tokens."""

import numpy as np
import tiny

from rope_jax import rope

LONGEST = 2_097_152
LAYERS = 3
_PARTS = ("pi", "ntk", "ntk_critical", "ntk_mixed", "ntk_by_parts", "yarn", "llama3")


def draw(rng: np.random.Generator, method: str, longest: int = LONGEST) -> rope.Rope:
  """A rope of the method from a random base, for a random context up to `longest` tokens.

  Every other one is for `longest` itself.
  """
  r = base(rng, longest // 2)
  L = r.original_context
  context = longest if rng.random() < 0.5 else round(L * (longest / L) ** rng.random())
  context = max(context, L + 1)
  options = _options(rng, method, r, context / L)
  return tiny.scaled(method, r, **dict(factor=context / L, seq_len=context) | options)


def base(rng: np.random.Generator, most: int = 131_072) -> rope.Rope:
  """A base with an original context of 2,048 to 131,072 tokens, or to `most`."""
  return rope.base(
    head_dim=int(rng.choice([64, 80, 128])),
    theta=float(rng.choice([1e4, 5e5, 1e7])),
    original_context=int(2048 * (min(most, 131_072) / 2048) ** rng.random()),
  )


def stacked(rng: np.random.Generator, r: rope.Rope) -> rope.Rope:
  """Often the rope with two that are made from it, by layer or by head, if it can be stacked."""
  axis = (None, "layer", "head")[rng.integers(3)]
  if not axis or r.inv_freq.ndim > 1 or any(x is not None for x in (r.short, r.mix, r.time)):
    return r
  return rope.stack([r, rope.power(r), rope.resonance(r)], axis)


def _options(rng: np.random.Generator, method: str, r: rope.Rope, factor: float) -> dict:
  """Valid values of every option that the method has."""
  pairs, u = len(r.inv_freq), rng.uniform
  by_parts = dict(
    ramp=str(rng.choice(["dim", "rotation"])),
    beta_fast=u(8, 64),
    beta_slow=u(0.1, 4),
    truncate=bool(rng.integers(2)),
  )
  policy = ("su", "yarn", 1.2)[rng.integers(3)]

  def factors(most):
    """For all layers, or a row for each; none so small that a pair turns in under two tokens."""
    shape = (pairs,) if rng.random() < 0.5 else (LAYERS, pairs)
    return np.sort(u(0.5, most, shape), axis=-1)

  c = int(rng.integers(1, pairs))
  tail = tuple(np.sort(u(factor, 2 * factor, pairs - c)))
  known = dict(
    ntk_mixed=dict(b=u(0.1, 8)),
    ntk_by_parts=by_parts,
    ntk_by_parts_v1=dict(beta=(u(1, 2), u(0.1, 0.9)), gamma=(u(9, 32), u(1, 8))),
    yarn=by_parts | (dict(attention_factor=u(0.1, 8)) if rng.random() < 0.5 else {}),
    dynamic_yarn=by_parts,
    llama3=dict(low_freq_factor=u(0.1, 2), high_freq_factor=u(2.1, 8)),
    longrope=dict(
      long_factor=factors(2 * factor),
      short_factor=factors(2) if rng.random() < 0.5 else (),
      start_tokens=int(rng.choice([0, 4, 4096, 1_500_000])),
      attention=policy,
    ),
    dynamic_longrope=dict(long_factor=factors(2 * factor), attention=policy),
    longrope2=dict(critical=c, tail=tail, attention=policy),
    dprope=dict(
      bins=int(rng.integers(1, 361)),
      candidates=tuple(rng.choice(_PARTS, rng.integers(1, 3), replace=False)),
      threshold=u(0, 1),
      direction=str(rng.choice(["forward", "reverse"])),
      reduction=str(rng.choice(["sum", "mean"])),
    ),
    abf=dict(theta=r.theta * 10 ** u(0, 3)),
    power=dict(exponent=u(0, 4)),
    truncated=dict(cutoff=int(rng.integers(0, LONGEST))),
    proportional=dict(proportion=u(0.05, 1)),
    cope=dict(pairs=int(rng.integers(1, pairs + 1)), hard=bool(rng.integers(2))),
    hope=dict(rotations=u(0.1, 8)),
    fope=dict(
      gain=u(0, 0.6),
      per_head=bool(rng.integers(2)),
      kv_heads=2,
      seed=int(rng.integers(9)),
      dropped=str(rng.choice(["zero", "one"])),
    ),
    clex=dict(max_factor=int(rng.integers(1, 1024))),
  )
  return known.get(method, {})
