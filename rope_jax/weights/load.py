"""From a checkpoint's tensors to our tree of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from rope_jax import resolve
from rope_jax.weights.source import open_source

# Our path in 'params' -> Hugging Face's tensor; {} is the layer. Matrices are [out, in] there.
_TENSORS = {
  "embedding": "model.embed_tokens.weight",
  "lm_head": "lm_head.weight",
  "final_norm/scale": "model.norm.weight",
  "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  "layers/attention/q": "model.layers.{}.self_attn.q_proj.weight",
  "layers/attention/k": "model.layers.{}.self_attn.k_proj.weight",
  "layers/attention/v": "model.layers.{}.self_attn.v_proj.weight",
  "layers/attention/o": "model.layers.{}.self_attn.o_proj.weight",
  "layers/mlp/gate": "model.layers.{}.mlp.gate_proj.weight",
  "layers/mlp/up": "model.layers.{}.mlp.up_proj.weight",
  "layers/mlp/down": "model.layers.{}.mlp.down_proj.weight",
}


def check(c) -> None:
  """Compares config.model and config.rope with the checkpoint of config.init_from.

  Raises:
    ValueError: naming the first key that differs, both values, and where they come from.
  """
  try:
    source = open_source(c.init_from)
  except ValueError as error:
    raise ValueError(f"config.init_from={c.init_from!r}: {error}") from error
  for key, value in source.hyperparameters.items():
    if not math.isclose(c.model[key], value, rel_tol=1e-6):
      raise ValueError(f"config.model.{key}={c.model[key]!r}: {c.init_from} has {value!r}")
  own = source.rope
  partial = own.rotary_dim / own.head_dim
  for key, value in (("theta", own.theta), ("partial_rotary_factor", partial)):
    if not math.isclose(c.rope[key], value, rel_tol=1e-6):
      raise ValueError(f"config.rope.{key}={c.rope[key]!r}: {c.init_from} has {value!r}")
  if c.rope.base == "checkpoint":
    resolve.base(c)  # compares them
  elif own.history:
    _check_own_rope(c, own)
  elif c.rope.original_context != own.original_context:
    raise ValueError(
      f"config.rope.original_context={c.rope.original_context}: {c.init_from} was trained on "
      f"{own.original_context} tokens"
    )


def _check_own_rope(c, own) -> None:
  """The rope of the checkpoint itself must be the rope of the config: nothing of it is lost."""
  ((scaling, options),) = own.history  # Hugging Face's types are one transform each
  values = [("scaling", c.rope.scaling, scaling)]
  # 'linear' does not say whether its maximum is before or after; the frequencies are the same.
  before = own.original_context / options["factor"]
  if scaling != "pi" or c.rope.original_context != before:
    values.append(("original_context", c.rope.original_context, own.original_context))
  for key, theirs in options.items():
    if key == "factor":
      values.append((key, resolve.factor(c), theirs))
    elif c.rope.scaling == scaling and key in c.rope.get(scaling, {}) and scaling != "longrope":
      values.append((f"{scaling}.{key}", c.rope[scaling][key], theirs))
  for key, ours, theirs in values:
    if ours != theirs:
      raise ValueError(
        f"config.rope.{key}={ours!r}: {c.init_from} has a rope of its own with {theirs!r}, "
        "which would be lost; config.rope.base='checkpoint' keeps it and starts from it"
      )
  ours = resolve.rope(c, own.original_context)  # the lists of longrope, from wherever they come
  same = np.allclose(ours.inv_freq, own.inv_freq, rtol=1e-6, atol=1e-20)
  if scaling == "longrope":
    same &= np.allclose(ours.history[0][1]["long_factor"], options["long_factor"], rtol=1e-6)
  if not (same and math.isclose(ours.attention_scale, own.attention_scale, rel_tol=1e-6)):
    raise ValueError(
      f"config.rope.{scaling}: {c.init_from} has a rope of its own with other frequencies or "
      f"another attention scale ({own.attention_scale:g}), which would be lost"
    )


def load_params(init_from: str, abstract: dict, put: Callable) -> dict:
  """Reads a base model into our tree, one leaf of it in host memory at a time.

  Args:
    init_from: see `rope_jax.weights.locate`.
    abstract: tree of ShapeDtypeStruct with the shapes and dtypes of the collection 'params'.
    put: (leaf of `abstract`, numpy array) -> array on the devices.

  Returns:
    The tree, with every leaf from the checkpoint.

  Raises:
    ValueError: if a tensor is missing or has the wrong number of elements.
  """
  source = open_source(init_from)

  def read(path, leaf):
    path = "/".join(p.key for p in path)
    name = _TENSORS[path]
    if "{}" not in name:
      return put(leaf, _oriented(source.tensor(name), path, leaf.shape).astype(leaf.dtype))
    stacked = np.empty(leaf.shape, leaf.dtype)
    for i in range(leaf.shape[0]):
      stacked[i] = _oriented(source.tensor(name.format(i)), path, leaf.shape[1:])
    return put(leaf, stacked)

  return jax.tree_util.tree_map_with_path(read, abstract)


def _oriented(x: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """[out, in] as stored -> our [in..., out...]; embeddings and norms stay as they are."""
  if x.size != math.prod(shape):
    raise ValueError(f"{path}: the checkpoint has shape {x.shape}, the model {shape}")
  if path == "embedding" or x.ndim == 1:
    return x.reshape(shape)
  return x.T.reshape(shape)
