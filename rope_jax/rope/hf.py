"""Ropes to and from Hugging Face's config, strictly: nothing is dropped, guessed or warned about.

`from_hf` reads `rope_parameters` (transformers 5) and the older `rope_scaling` with `rope_theta`.
`to_hf` writes the native type where there is one; every other static rope becomes a 'longrope'
with the same factors for short and long inputs, which transformers runs unmodified. (Not vLLM,
whose longrope ignores attention_factor.)
Formulas, keys and defaults: transformers 5.23 `modeling_rope_utils.py`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rope_jax.rope import scaling, shaping
from rope_jax.rope.limits import MOST_TOKENS
from rope_jax.rope.longrope import longrope
from rope_jax.rope.rotary import Rope, base

# A frequency of zero as a factor that strict JSON can hold: the angle stays below 1e-20 rad.
_STILL = 1e30
_LENGTHS = {"original_max_position_embeddings"}
_LISTS = ("short_factor", "long_factor")
# Written by the YaRN repository; changes no frequency.
_WITHOUT_EFFECT = {"finetuned"}
# Other architectures' ways to change a rope, which this does not read.
_ELSEWHERE = (
  "qk_rope_head_dim",
  "rope_local_base_freq",
  "rotary_pct",
  "rotary_emb_base",
  "rotary_dim",
)
# type -> (required keys, optional keys), besides rope_type, rope_theta and partial_rotary_factor.
_KEYS = dict(
  default=(set(), set()),
  linear=({"factor"}, _LENGTHS),
  dynamic=({"factor"}, _LENGTHS),
  yarn=(
    {"factor"},
    _LENGTHS
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
  ),
  longrope=({"short_factor", "long_factor"}, _LENGTHS | {"factor", "attention_factor"}),
  llama3=({"factor", "low_freq_factor", "high_freq_factor"}, _LENGTHS),
  proportional=({"partial_rotary_factor"}, {"factor"}),
)


def from_hf(config: dict, seq_len: int | None = None, layer_type: str | None = None) -> Rope:
  """The rope of a Hugging Face model config.

  Args:
    config: the contents of config.json: `rope_parameters`, or `rope_scaling` and `rope_theta`;
      `max_position_embeddings`; `head_dim`, or `hidden_size` and `num_attention_heads`.
    seq_len: tokens of the sequence, for 'dynamic' and 'longrope'; the original context if None.
    layer_type: which one, where there is a rope for each type of layer ('full_attention', ...).

  Returns:
    The Rope, not rebased: apply `rebase` before stretching a rope that is scaled already.

  Raises:
    ValueError: naming the key that is missing, unknown, impossible, or at odds with another.
  """
  for key in _ELSEWHERE:
    if config.get(key) is not None:
      raise ValueError(f"{key}={config[key]!r}: ropes that are set by this key are not supported")
  parameters = _parameters(config, layer_type)
  kind = parameters.pop("rope_type")
  theta = parameters.pop("rope_theta")
  required, optional = _KEYS[kind]
  partial = parameters.get("partial_rotary_factor")
  known = required | optional | {"partial_rotary_factor"}
  for key in parameters:
    if key not in known:
      raise ValueError(f"rope_parameters.{key}: unknown for rope_type {kind!r}; known: "
                       + ", ".join(sorted(known)))  # fmt: skip
  for key in sorted(required):
    if parameters.get(key) is None and not (kind == "yarn" and key in parameters):
      raise ValueError(f"rope_parameters.{key}: required by rope_type {kind!r}")
  for key, value in parameters.items():
    if key in _LISTS:
      _list(f"rope_parameters.{key}", value)
    elif key == "truncate":
      if not isinstance(value, bool):
        raise ValueError(f"rope_parameters.truncate={value!r} must be true or false")
    elif value is not None:
      _number(f"rope_parameters.{key}", value)
  for key in ("mscale", "mscale_all_dim"):  # 0 is absent, as in transformers
    if not parameters.get(key):
      parameters.pop(key, None)

  maximum = _whole("max_position_embeddings", config.get("max_position_embeddings"))
  original = _original(config, parameters, kind, maximum)
  factor = parameters.get("factor")
  if factor is None:
    factor = maximum / original if kind in ("yarn", "longrope") else 1.0
  if not 1 <= factor <= MOST_TOKENS:
    raise ValueError(f"rope_parameters.factor={factor} must be from 1 to 2^31 - 1")
  if partial is not None and not 0 < partial <= 1:
    raise ValueError(f"rope_parameters.partial_rotary_factor={partial} must be in (0, 1]")
  _check_lengths(kind, factor, original, maximum, parameters)
  rope = base(
    head_dim=_head_dim(config),
    theta=theta,
    original_context=original,
    partial_rotary_factor=1.0 if partial is None or kind == "proportional" else partial,
  )
  n = original if seq_len is None else seq_len
  given = {k: v for k, v in parameters.items() if v is not None}
  if kind == "default":
    out = rope
  elif kind == "linear":
    out = scaling.pi(rope, factor)
  elif kind == "dynamic":
    out = scaling.dynamic_ntk(rope, factor, seq_len=n)
  elif kind == "yarn":
    names = _KEYS["yarn"][1] - _LENGTHS
    out = scaling.yarn(rope, factor, **{k: given[k] for k in names if k in given})
  elif kind == "llama3":
    names = ("low_freq_factor", "high_freq_factor")
    out = scaling.llama3(rope, factor, **{k: given[k] for k in names})
  elif kind == "proportional":
    out = shaping.proportional(rope, factor, proportion=partial)
  else:
    attention = given.get("attention_factor", "su")
    lists = {k: given[k] for k in ("short_factor", "long_factor")}
    out = longrope(rope, factor, seq_len=n, attention=attention, **lists)
    # A factor of 1e30 or more stands for a pair that does not turn.
    chosen = np.asarray(lists["long_factor" if n > original else "short_factor"])
    out = dataclasses.replace(out, inv_freq=np.where(chosen >= _STILL, 0.0, out.inv_freq))
  # Some configs keep the original length as the maximum, though the factor reaches further. The
  # factor of llama3 is of frequencies: Llama 3.2 has 32 and reaches 16 times its original length.
  context = maximum if kind in ("dynamic", "proportional", "llama3") else max(maximum, out.context)
  return dataclasses.replace(out, context=context)


def to_hf(rope: Rope, *, freeze: bool = False, only: tuple[str, ...] | None = None) -> dict:
  """The entries of a Hugging Face config that give this rope.

  Args:
    rope: on the host.
    freeze: export a rope that depends on the length of the sequence as it is at its present
      length, for all lengths.
    only: types that the architecture has (Phi-3: 'default' and 'longrope'); all of them if None.

  Returns:
    {'head_dim', 'max_position_embeddings', 'rope_parameters': {...}}, to update a config with.

  Raises:
    ValueError: if no such config exists: frequencies that differ by layer or head, by position,
      or that are learned or mixed.
  """
  if rope.theta is None:
    raise ValueError("to_hf: this rope came out of jit; export the one that went in")
  for what, unfit in (
    ("differs by layer or head", rope.inv_freq.ndim > 1),
    ("has another rope for its first tokens (start_tokens)", rope.short is not None),
    ("mixes frequencies (fope)", rope.mix is not None),
    ("has learned frequencies (clex)", rope.time is not None),
  ):
    if unfit:
      raise ValueError(f"to_hf: Hugging Face has no rope that {what}")
  parameters = None if freeze and depends_on_length(rope) else _native(rope)
  if parameters and only and parameters["rope_type"] not in only:
    parameters = None
  maximum = rope.context
  if parameters is None:
    if depends_on_length(rope) and not freeze:
      raise ValueError(
        f"to_hf: {' and '.join(n for n, _ in rope.history)} depends on the length of the sequence "
        "and has no native type; freeze=True exports it as it is at its present length"
      )
    parameters = _as_longrope(rope)
  elif parameters["rope_type"] in ("yarn", "longrope"):
    # What the factor reaches: a longer context is tried out, not made for.
    maximum = min(maximum, math.ceil(parameters["factor"] * rope.original_context))
  elif parameters["rope_type"] in ("linear", "dynamic"):
    maximum = rope.original_context  # what these two extend
  if rope.rotary_dim != rope.head_dim:
    parameters["partial_rotary_factor"] = rope.rotary_dim / rope.head_dim
  return dict(
    head_dim=rope.head_dim, max_position_embeddings=int(maximum), rope_parameters=parameters
  )


def depends_on_length(rope: Rope) -> bool:
  """Whether a rope would have other frequencies for a sequence of another length."""

  def differs(options: dict) -> bool:
    if "seq_len" not in options:
      return False
    lists = [options.get(key) for key in _LISTS]
    given = all(x is not None for x in lists)
    return not (given and options.get("start_tokens", 0) == 0 and np.array_equal(*lists))

  return any(differs(options) for _, options in rope.history)


def _native(rope: Rope) -> dict | None:
  """rope_parameters of Hugging Face's own type for this rope, or None if there is none."""
  history, theta = list(rope.history), rope.theta
  while history and history[0][0] == "abf":  # a larger base is no type of its own
    history.pop(0)
  if not history:
    return dict(rope_type="default", rope_theta=theta)
  if len(history) > 1:
    return None
  (name, o), L = history[0], rope.original_context
  original = dict(original_max_position_embeddings=L)
  if name in ("ntk", "ntk_critical") and len(rope.inv_freq) > 1:
    # inv_freq_1 = theta'^(-2/d), whatever the method: the new base is read off.
    return dict(rope_type="default", rope_theta=float(rope.inv_freq[1] ** (-rope.rotary_dim / 2)))
  if name == "pi":
    return dict(rope_type="linear", rope_theta=theta, factor=float(o["factor"]))
  if name == "dynamic_ntk":
    return dict(rope_type="dynamic", rope_theta=theta, factor=float(o["factor"]))
  if name == "llama3":
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return dict(rope_type="llama3", rope_theta=theta, **original, **{k: float(o[k]) for k in names})
  if name == "proportional":
    return dict(
      rope_type="proportional",
      rope_theta=theta,
      partial_rotary_factor=o["proportion"],
      **({"factor": float(o["factor"])} if o["factor"] != 1 else {}),
    )
  if name == "yarn" and o["ramp"] == "dim":
    out = dict(rope_type="yarn", rope_theta=theta, factor=float(o["factor"]), **original)
    defaults = dict(beta_fast=32.0, beta_slow=1.0, truncate=True, attention_factor=None)
    defaults |= dict(mscale=None, mscale_all_dim=None)
    return out | {k: o[k] for k, v in defaults.items() if o[k] != v}
  if name in ("longrope", "longrope2") and o["long_factor"].ndim == o["short_factor"].ndim == 1:
    lists = {k: o[k].tolist() for k in ("short_factor", "long_factor")}
    out = dict(
      rope_type="longrope", rope_theta=theta, factor=float(o["factor"]), **original, **lists
    )
    return out if o["attention"] == "su" else out | dict(attention_factor=rope.attention_scale)
  return None


def _as_longrope(rope: Rope) -> dict:
  plain = rope.theta ** (-np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim)
  still = rope.inv_freq == 0
  factors = np.where(still, _STILL, plain / np.where(still, 1.0, rope.inv_freq)).tolist()
  return dict(
    rope_type="longrope",
    rope_theta=rope.theta,
    original_max_position_embeddings=rope.original_context,
    factor=max(rope.context / rope.original_context, 1.0),
    attention_factor=float(rope.attention_scale),
    short_factor=factors,
    long_factor=factors,
  )


def _parameters(config: dict, layer_type: str | None) -> dict:
  """One flat dict with rope_type and rope_theta, from either generation of keys."""
  newer, older = config.get("rope_parameters"), config.get("rope_scaling")
  if newer and older and newer != older:
    raise ValueError("rope_parameters and rope_scaling are both given and differ")
  out = newer or older or {}
  if not isinstance(out, dict):
    raise ValueError(f"rope_parameters={out!r} must be an object")
  by_layer = [k for k, v in out.items() if isinstance(v, dict)]
  if by_layer or layer_type:
    if layer_type not in by_layer:
      raise ValueError(
        f"rope_parameters: layer_type={layer_type!r} must be one of the types of layer that have a "
        f"rope of their own: {', '.join(by_layer) or 'none'}"
      )
    out = out[layer_type]
  out = {k: v for k, v in out.items() if k not in _WITHOUT_EFFECT}
  kinds = [str(out.pop(k)) for k in ("rope_type", "type") if out.get(k) is not None]
  out = {k: v for k, v in out.items() if k not in ("rope_type", "type")}
  if len(set(kinds)) > 1:
    raise ValueError(f"rope_parameters: rope_type={kinds[0]!r} and type={kinds[1]!r} differ")
  kind = kinds[0] if kinds else "default"
  if not kinds and set(out) - {"rope_theta", "partial_rotary_factor"}:
    raise ValueError(f"rope_parameters has {sorted(out)} and no rope_type: it would be ignored")
  if kind == "su" or (kind == "yarn" and "long_factor" in out):
    kind = "longrope"  # Phi-3's first names for it
  if not isinstance(kind, str) or kind not in _KEYS:
    raise ValueError(f"rope_parameters.rope_type={kind!r}: expected one of {', '.join(_KEYS)}")
  for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", None)):
    inside, outside = out.get(key), config.get(key)
    if inside is not None and outside is not None and inside != outside:
      raise ValueError(f"rope_parameters.{key}={inside} and {key}={outside} differ")
    out[key] = inside if inside is not None else outside if outside is not None else default
  if out["partial_rotary_factor"] is None:
    del out["partial_rotary_factor"]
  return dict(out, rope_type=kind, rope_theta=float(_number("rope_theta", out["rope_theta"])))


def _original(config: dict, parameters: dict, kind: str, maximum: int) -> int:
  key = "original_max_position_embeddings"
  inside, outside = parameters.get(key), config.get(key)
  if inside is not None and outside is not None and inside != outside:
    raise ValueError(f"rope_parameters.{key}={inside} and {key}={outside} differ")
  original = inside if inside is not None else outside
  return maximum if original is None else _whole(key, original)


def _check_lengths(kind, factor, original, maximum, parameters) -> None:
  """The factor, the original and the maximum length must tell one story."""
  if original > maximum:
    raise ValueError(
      f"original_max_position_embeddings={original} is above max_position_embeddings={maximum}"
    )
  if kind == "dynamic" and original != maximum:
    raise ValueError(
      f"original_max_position_embeddings={original}: rope_type 'dynamic' extends "
      f"max_position_embeddings={maximum} and has no other original length"
    )
  # A maximum below what the factor reaches is common (the original length, or what was tested).
  if kind in ("yarn", "longrope") and maximum > factor * original + 1:
    raise ValueError(
      f"rope_parameters.factor={factor} and max_position_embeddings={maximum} disagree: "
      f"{factor:g} times original_max_position_embeddings={original} is {factor * original:g}"
    )


def _head_dim(config: dict) -> int:
  if config.get("head_dim") is not None:
    return _whole("head_dim", config["head_dim"])
  for key in ("hidden_size", "num_attention_heads"):
    _whole(key, config.get(key))
  return config["hidden_size"] // config["num_attention_heads"]


def _number(key: str, value) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
    raise ValueError(f"{key}={value!r} must be a number")
  return value


def _list(key: str, value) -> None:
  if not isinstance(value, list | tuple) or not value:
    raise ValueError(f"{key}={value!r} must be a list of numbers")
  for x in value:
    _number(f"{key}: a factor", x)


def _whole(key: str, value) -> int:
  if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
    raise ValueError(f"{key}={value!r} must be a whole number from 1 to 2^31 - 1")
  return value
