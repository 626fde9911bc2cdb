"""What a checkpoint is, for people and as data, from its headers alone."""

from __future__ import annotations

import math

import numpy as np

from rope_jax import reading
from rope_jax import rope as rope_lib
from rope_jax.weights import locate
from rope_jax.weights.source import open_source


def describe(path: str) -> dict:
  """Architecture, tensors and own rope of a checkpoint, as plain data.

  Raises:
    ValueError: if it cannot be read.
  """
  source = open_source(path)
  own = source.rope
  names = source.names()
  return dict(
    path=locate(path)[1],
    kind=locate(path)[0],
    model={k: list(v) if isinstance(v, tuple) else v for k, v in source.hyperparameters.items()},
    parameters=sum(math.prod(source.shape(name)) for name in names),
    tensors=len(names),
    unread=list(source.unread),
    phase=source.phase,
    rope=dict(
      methods=[[name, {k: _plain(v) for k, v in o.items()}] for name, o in own.history],
      theta=own.theta,
      original_context=own.original_context,
      context=own.context,
      rotary_dim=own.rotary_dim,
      attention_scale=float(own.attention_scale),
      inv_freq=np.asarray(own.inv_freq).tolist(),
      critical_pair=int(rope_lib.critical_pair(own)),
    ),
  )


def text(d: dict) -> str:
  """The same for the screen, with the lines of a config that extends it."""
  r = d["rope"]
  lines = [f"{d['path']}: {d['parameters']:,} parameters in {d['tensors']} tensors ({d['kind']})"]
  lines += ["model: " + ", ".join(f"{k} {v}" for k, v in d["model"].items())]
  own = " then ".join(f"{name} {_short(options)}".strip() for name, options in r["methods"])
  waves = [2 * math.pi / f for f in r["inv_freq"] if f]
  lines.append(
    f"its rope: {own or 'plain'}; theta {r['theta']:g}, context {r['original_context']:,}"
    + f" -> {r['context']:,}" * (r["context"] != r["original_context"])
    + f", attention scale {r['attention_scale']:.4f}, wavelengths {min(waves):.2f} .. "
    f"{max(waves):,.0f} tokens, critical pair {r['critical_pair']}"
  )
  if d["phase"]:
    lines.append(f"learned phase: {d['phase']}")
  if d["unread"]:
    lines.append(f"not understood, so it cannot be loaded: {reading.listed(d['unread'])}")
  lines += [
    "",
    "to extend it, in a config file:",
    f"  c = presets.pretrained({d['path']!r}, extend=True)",
    f"  c.rope.context = {4 * r['context']}",
    '  c.rope.scaling = "yarn"',
  ]
  return "\n".join(lines)


def _short(options: dict) -> str:
  shown = {k: f"[{len(v)} numbers]" if isinstance(v, list) else v for k, v in options.items()
           if v is not None}  # fmt: skip
  return "(" + ", ".join(f"{k}={v}" for k, v in shown.items()) + ")" if shown else ""


def _plain(value):
  if isinstance(value, np.ndarray):
    return value.tolist()
  return list(value) if isinstance(value, tuple) else value
