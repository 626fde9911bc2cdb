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
    h = dict(open_source(c.init_from).hyperparameters)
  except ValueError as error:
    raise ValueError(f"config.init_from={c.init_from!r}: {error}") from error
  theta, own, context = h.pop("theta"), h.pop("rope"), h.pop("context")
  for key, value in h.items():
    same = math.isclose(c.model[key], value, rel_tol=1e-6)
    if not same:
      raise ValueError(f"config.model.{key}={c.model[key]!r}: {c.init_from} has {value!r}")
  if not math.isclose(c.rope.theta, theta, rel_tol=1e-6):
    raise ValueError(f"config.rope.theta={c.rope.theta!r}: {c.init_from} has {theta!r}")
  if own:
    _check_own_rope(c, own)
  elif c.rope.original_context != context:
    raise ValueError(
      f"config.rope.original_context={c.rope.original_context}: {c.init_from} was trained on "
      f"{context} tokens"
    )


# Names of transformers' rope types where ours differ.
_OUR_NAMES = dict(linear="pi", dynamic="dynamic_ntk")


def _check_own_rope(c, own: dict) -> None:
  """The rope of the checkpoint itself must be the rope of the config: nothing of it is lost."""
  own = {k: v for k, v in own.items() if v is not None}
  scaling = own.pop("rope_type")
  scaling = _OUR_NAMES.get(scaling, scaling)
  ours = dict(scaling=c.rope.scaling)
  theirs = dict(scaling=scaling)
  for key, value in own.items():
    if key == "factor":
      ours[key], theirs[key] = resolve.factor(c), value
    elif key == "original_max_position_embeddings":
      ours["original_context"], theirs["original_context"] = c.rope.original_context, value
    else:
      name, options = f"{scaling}.{key}", c.rope.get(scaling, {})
      ours[name], theirs[name] = options.get(key), value
  for key, value in theirs.items():
    if ours[key] != value:
      raise ValueError(
        f"config.rope.{key}={ours[key]!r}: {c.init_from} has a rope of its own with {value!r}, "
        "which would be lost"
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
