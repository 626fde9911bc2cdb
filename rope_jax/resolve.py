"""From a config to its rope."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os

import numpy as np
from ml_collections import ConfigDict

from rope_jax import config, factors
from rope_jax import rope as rope_lib
from rope_jax.errors import check, choice
from rope_jax.rope.limits import MOST_TOKENS, check_tokens
from rope_jax.weights import locate
from rope_jax.weights.source import open_source

PHASES = ("none", "psc", "psc_rotation")


def rope(c: ConfigDict, seq_len: int | None = None) -> rope_lib.Rope:
  """The resolved rope: base, scaling, then resonance.

  Args:
    c: a config.
    seq_len: tokens of the sequence, for methods that depend on it; rope.context if None.

  Raises:
    ValueError: naming the key at fault.
  """
  r = c.rope
  check_keys(c)
  if seq_len is not None:
    check_tokens("the rope of a sequence: seq_len", seq_len)
  function = rope_lib.SCALINGS[r.scaling]
  options = {k: r[r.scaling][k] for k in config.method_options(function)}
  if r.scaling in r and r[r.scaling].get("factors"):
    options |= _from_file(c)
  elif (
    r.scaling == "longrope"
    and c.search.method
    and (c.search.factors == "long" or c.search.base)
    and not options["long_factor"]
  ):
    raise ValueError(
      f"config.search.method={c.search.method!r}: the factors are still to be found: "
      "launch/search.py does so and goes on with them, or give rope.longrope.factors"
    )
  given = dict(
    factor=factor(c),
    seq_len=r.context if seq_len is None else seq_len,
    kv_heads=c.model.num_kv_heads,
  )
  options |= {k: v for k, v in given.items() if k in inspect.signature(function).parameters}
  try:
    out = function(base(c), **options)
    out = rope_lib.resonance(out) if r.resonance else out
  except ValueError as error:
    raise ValueError(f"config.rope: {error}") from None
  layers = out.inv_freq.shape[0] if out.inv_freq.ndim > 1 else 1
  check(layers in (1, c.model.num_layers), f"rope.{r.scaling}", f"{layers} rows of frequencies",
        f"one, or one for each of model.num_layers={c.model.num_layers}")  # fmt: skip
  return dataclasses.replace(out, context=r.context)


def base(c: ConfigDict) -> rope_lib.Rope:
  """The rope that the base model was trained with: plain, or scaled by its checkpoint's own."""
  r = c.rope
  try:
    plain = rope_lib.base(
      head_dim=c.model.head_dim,
      theta=r.theta,
      original_context=r.original_context,
      partial_rotary_factor=r.partial_rotary_factor,
    )
  except ValueError as error:
    raise ValueError(f"config.rope: {error}") from None
  return plain if r.base == "plain" else rope_lib.rebase(_own_rope(c, plain))


def _own_rope(c: ConfigDict, plain: rope_lib.Rope) -> rope_lib.Rope:
  """The rope of config.init_from, which must agree with what the config says of its base."""
  kind, path = ("", "")
  if c.init_from and not c.init_from.startswith("run:"):
    try:
      kind, path = locate(c.init_from)
    except ValueError as error:
      raise ValueError(f"config.init_from={c.init_from!r}: {error}") from None
  check(kind, "rope.base", c.rope.base, "'plain' unless init_from is a checkpoint or a run")
  if kind == "run":
    source = config.read(path)
    own = rope(source) if source.train.rope == "scaled" else _unscaled(source)
  else:
    try:
      own = open_source(path).rope
    except ValueError as error:
      raise ValueError(f"config.init_from={c.init_from!r}: {error}") from error
  names = [name for name, _ in own.history]
  if names == ["longrope"] and rope_lib.depends_on_length(own):
    # It goes on from its factors for long texts, which are those of the context that it reaches.
    options = dict(own.history[0][1], seq_len=own.context)
    plain_own = dataclasses.replace(plain, original_context=own.original_context)
    own = dataclasses.replace(rope_lib.longrope(plain_own, **options), context=own.context)
  else:
    check(not rope_lib.depends_on_length(own), "rope.base", c.rope.base,
          f"'plain', and the method of {c.init_from}, {names}, as rope.scaling: frequencies that "
          "depend on the length have no other method over them")  # fmt: skip
  if names == ["pi"] and c.rope.original_context == own.original_context:
    # 'linear' does not say whether its maximum is before or after: both are taken.
    own = dataclasses.replace(own, context=own.original_context)
  for key, ours, theirs in (
    ("theta", c.rope.theta, own.theta),
    ("original_context", c.rope.original_context, own.context),
    ("partial_rotary_factor", plain.rotary_dim, own.rotary_dim),
  ):
    check(ours == theirs, f"rope.{key}", c.rope[key],
          f"{theirs}, as the rope of {c.init_from} has it")  # fmt: skip
  return own


def training_rope(c: ConfigDict, time: int = 1) -> rope_lib.Rope:
  """The rope of a training step, which goes with the positions that config.data.positions gives.

  Args:
    c: a config.
    time: CLEX's t of this step.
  """
  kind, length = c.data.positions, config.train_length(c)
  if c.train.rope == "unscaled":
    return _unscaled(c)
  if kind == "e2_llm":
    return base(c)  # the scales are in the positions; the config's rope is for inference
  if kind in ("pose", "randomised"):
    return rope(c, c.rope.context)
  if kind == "clex":
    return rope(c, time * c.rope.original_context)
  long = rope(c, length)
  if kind != "mixed":
    return long
  check(long.start_tokens is None, "data.positions", kind,
        "another where factors come with start_tokens: a rope has one other rope for some of its "
        "tokens")  # fmt: skip
  # Short segments: what the method gives to so few tokens, or else the untouched base.
  own = depends_on_length(c)
  return dataclasses.replace(long, short=rope(c, c.rope.original_context) if own else base(c))


def _unscaled(c: ConfigDict) -> rope_lib.Rope:
  """The base, with whole wavelengths if rope.resonance: as if there were no rope.scaling."""
  return rope_lib.resonance(base(c)) if c.rope.resonance else base(c)


def depends_on_length(c: ConfigDict) -> bool:
  """Whether the frequencies of the config's method are a function of the sequence length."""
  return "seq_len" in inspect.signature(rope_lib.SCALINGS[c.rope.scaling]).parameters


def factor(c: ConfigDict) -> float:
  """The extension factor: config.rope.factor, or context / original_context."""
  return c.rope.context / c.rope.original_context if c.rope.factor is None else c.rope.factor


def describe(c: ConfigDict, seq_len: int | None = None, r: rope_lib.Rope | None = None) -> dict:
  """The resolved rope, or the rope `r` that was made from this config otherwise, as plain data.

  For screen and JSON; an infinite wavelength is None.
  """
  length = None if r is not None else c.rope.context if seq_len is None else seq_len
  trained_unscaled = r is not None and c.train.rope == "unscaled"
  scaling = "none" if trained_unscaled else c.rope.scaling
  r = rope(c, length) if r is None else r
  parameters = inspect.signature(rope_lib.SCALINGS[scaling]).parameters
  out = dict(
    base=c.rope.base,
    scaling=scaling,
    factor=float(factor(c)) if {"factor", "seq_len"} & set(parameters) else 1.0,
    resonance=c.rope.resonance,
    phase=c.rope.phase,
    training=c.train.rope,
    theta=c.rope.theta,
    head_dim=c.model.head_dim,
    original_context=c.rope.original_context,
    context=c.rope.context,
    attention_scale=np.asarray(r.attention_scale).tolist(),
    inv_freq=r.inv_freq.tolist(),
    wavelengths=_plain(r.wavelengths.tolist()),
    critical_pair=rope_lib.critical_pair(base(c)),
    history=_plain([[name, options] for name, options in r.history]),
  )
  return out | (dict(seq_len=length) if depends_on_length(c) and length else {})


def disturbance(c: ConfigDict, seq_len: int | None = None) -> list:
  """Of each pair, by how much the rope moves its angle distribution at that many tokens (nats)."""
  length = c.rope.context if seq_len is None else seq_len
  r = rope(c, length)
  rows = [dataclasses.replace(r, inv_freq=row) for row in r.inv_freq.reshape(-1, r.rotary_dim // 2)]
  found = [rope_lib.disturbance(row, base(c), length).tolist() for row in rows]
  return found[0] if r.inv_freq.ndim == 1 else found


def _plain(value):
  """JSON has no infinity, no arrays and no tuples."""
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return None if isinstance(value, float) and not np.isfinite(value) else value


def fingerprint(c: ConfigDict) -> str:
  """Of the factor lists that the config takes from a file, which may change under a run."""
  file = c.rope.get(c.rope.scaling, {}).get("factors")
  return hashlib.sha256(repr(_from_file(c)).encode()).hexdigest()[:16] if file else ""


def _from_file(c: ConfigDict) -> dict:
  key, block = f"rope.{c.rope.scaling}", c.rope[c.rope.scaling]
  for name in ("long_factor", "short_factor", "start_tokens"):
    check(not block.get(name), f"{key}.{name}", block.get(name),
          f"empty where {key}.factors names a file")  # fmt: skip
  plain = os.path.isfile(block.factors) or not os.path.exists(block.factors)
  check(plain, f"{key}.factors", block.factors, "a regular file")  # a device might be endless
  try:
    found = factors.read(block.factors)
    factors.check(found, factors_made_for(c))
    lost = sorted(set(found) - set(block) - {"made_for", "short_factor"})
    if lost:
      raise ValueError(f"rope.scaling={c.rope.scaling!r} has no use for its {', '.join(lost)}")
  except ValueError as error:
    said = str(error).removeprefix(f"{block.factors}: ")  # the path is there once, and quoted
    raise ValueError(f"config.{key}.factors={block.factors!r}: {said}") from None
  return {k: v for k, v in found.items() if k in block}


def factors_made_for(c: ConfigDict) -> dict:
  """What a file of factors says of the rope that they are for, as far as it must be the same."""
  r = c.rope
  return dict(
    theta=r.theta,
    head_dim=c.model.head_dim,
    partial_rotary_factor=r.partial_rotary_factor,
    base=r.base,
    original_context=r.original_context,
    factor=factor(c),
    attention=r[r.scaling].attention,
    resonance=r.resonance,
  )


def check_keys(c: ConfigDict) -> None:
  """Raises ValueError for a key of config.rope that no rope can be made from."""
  r = c.rope
  choice("rope.scaling", r.scaling, rope_lib.SCALINGS)
  choice("rope.base", r.base, ("plain", "checkpoint"))
  choice("rope.phase", r.phase, PHASES)
  choice("rope.psc.calibration", r.psc.calibration, ("pre", "post"))
  for phase in PHASES[1:]:
    choice(f"rope.{phase}.init", r[phase].init, ("released", "fan_in"))
    choice(f"rope.{phase}.share", r[phase].share, ("none", "heads", "layers", "all"))
  check(r.psc_rotation.bound >= 0, "rope.psc_rotation.bound", r.psc_rotation.bound,
        "0 (unbounded) or positive radians")  # fmt: skip
  for key in ("original_context", "context"):
    check(1 <= r[key] <= MOST_TOKENS, f"rope.{key}", r[key],
          f"at least 1 token, at most {MOST_TOKENS} (2^31 - 1: positions are int32)")  # fmt: skip
  check(r.context >= r.original_context, "rope.context", r.context,
         f"at least rope.original_context={r.original_context}")  # fmt: skip
  parameters = inspect.signature(rope_lib.SCALINGS[r.scaling]).parameters
  needs_factor = "factor" in parameters and parameters["factor"].default is inspect.Parameter.empty
  if r.factor is not None:
    check(r.factor >= 1, "rope.factor", r.factor, "at least 1")
    check("factor" in parameters, "rope.factor", r.factor,
           f"not to be set, since rope.scaling={r.scaling!r} uses no factor")  # fmt: skip
  if r.factor is None and needs_factor or "seq_len" in parameters:
    check(r.context > r.original_context, "rope.context", r.context,
           f"above rope.original_context={r.original_context}: rope.scaling={r.scaling!r} would do "
           "nothing")  # fmt: skip
  check(r.scaling != "clex" or not r.resonance, "rope.resonance", r.resonance,
        "False: what rope.scaling='clex' learns has no whole wavelengths")  # fmt: skip
  # A setting that nothing reads is an error, not a surprise in the results.
  default = config.base().rope
  for method in default:
    if not isinstance(default[method], ConfigDict) or method in (r.scaling, r.phase):
      continue
    for key, value in default[method].items():
      check(r[method][key] == value, f"rope.{method}.{key}", r[method][key],
             f"left at {value!r}, since rope.scaling={r.scaling!r}, rope.phase={r.phase!r} do not "
             "use it")  # fmt: skip
