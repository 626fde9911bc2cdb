"""From a config to its rope."""

from __future__ import annotations

import inspect

from ml_collections import ConfigDict

from rope_jax import config
from rope_jax import rope as rope_lib
from rope_jax.errors import check, choice


def rope(c: ConfigDict, seq_len: int | None = None) -> rope_lib.Rope:
  """The resolved rope: base, scaling, then resonance.

  Args:
    c: a config.
    seq_len: tokens of the sequence, for methods that depend on it; rope.context if None.

  Raises:
    ValueError: naming the key at fault.
  """
  r = c.rope
  _validate(c)
  function = rope_lib.SCALINGS[r.scaling]
  parameters = inspect.signature(function).parameters
  options = {k: r[r.scaling][k] for k in config.method_options(function)}
  if "factor" in parameters:
    options["factor"] = factor(c)
  if "seq_len" in parameters:
    options["seq_len"] = seq_len or r.context
  try:
    out = rope_lib.base(
      head_dim=c.model.head_dim, theta=r.theta, original_context=r.original_context
    )
    out = function(out, **options)
    return rope_lib.resonance(out) if r.resonance else out
  except ValueError as error:
    raise ValueError(f"config.rope: {error}") from None


def factor(c: ConfigDict) -> float:
  """The extension factor: config.rope.factor, or context / original_context."""
  return c.rope.context / c.rope.original_context if c.rope.factor is None else c.rope.factor


def describe(c: ConfigDict, seq_len: int | None = None) -> dict:
  """The resolved rope as plain data, for the screen and for JSON."""
  r = rope(c, seq_len)
  return dict(
    scaling=c.rope.scaling,
    factor=1.0 if c.rope.scaling == "none" else factor(c),
    resonance=c.rope.resonance,
    phase=c.rope.phase,
    theta=c.rope.theta,
    head_dim=c.model.head_dim,
    original_context=c.rope.original_context,
    context=c.rope.context,
    attention_scale=float(r.attention_scale),
    inv_freq=r.inv_freq.tolist(),
    wavelengths=r.wavelengths.tolist(),
    history=[[name, options] for name, options in r.history],
  )


def _validate(c: ConfigDict) -> None:
  r = c.rope
  choice("rope.scaling", r.scaling, rope_lib.SCALINGS)
  choice("rope.phase", r.phase, ("none", "psc"))
  choice("rope.psc.calibration", r.psc.calibration, ("pre", "post"))
  choice("rope.psc.init", r.psc.init, ("released", "fan_in"))
  check(r.original_context >= 1, "rope.original_context", r.original_context, "at least 1 token")
  check(r.context >= r.original_context, "rope.context", r.context,
         f"at least rope.original_context={r.original_context}")  # fmt: skip
  if r.factor is not None:
    check(r.factor >= 1, "rope.factor", r.factor, "at least 1")
    check(r.scaling != "none", "rope.factor", r.factor,
           "not to be set, since rope.scaling='none' uses no factor")  # fmt: skip
  elif r.scaling != "none":
    check(r.context > r.original_context, "rope.context", r.context,
           f"above rope.original_context={r.original_context}: rope.scaling={r.scaling!r} would do "
           "nothing")  # fmt: skip
  # A setting that nothing reads is an error, not a surprise in the results.
  default = config.base().rope
  for method in default:
    if not isinstance(default[method], ConfigDict) or method in (r.scaling, r.phase):
      continue
    for key, value in default[method].items():
      check(r[method][key] == value, f"rope.{method}.{key}", r[method][key],
             f"left at {value!r}, since rope.scaling={r.scaling!r}, rope.phase={r.phase!r} do not "
             "use it")  # fmt: skip
