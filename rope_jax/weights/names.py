"""Tensors of our tree of parameters under the names and in the layout of Hugging Face's Llama.

A matrix is [in..., out...] with our einsum, stacked over layers, and [out, in] there; embeddings,
norms and biases are the same but for the heads, which are rows there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import numpy as np

# Our path in the collection 'params' -> name there; {} is the layer.
_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "lm_head": "lm_head.weight",
  "final_norm/scale": "model.norm.weight",
  "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
  "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
}
_BLOCKS = dict(attention=("self_attn", "qkvo"), mlp=("mlp", ("gate", "up", "down")))
for _ours, (_theirs, _linears) in _BLOCKS.items():
  for _x in _linears:
    _NAMES[f"layers/{_ours}/{_x}"] = f"model.layers.{{}}.{_theirs}.{_x}_proj.weight"
    _NAMES[f"layers/{_ours}/{_x}_bias"] = f"model.layers.{{}}.{_theirs}.{_x}_proj.bias"


def leaves(params: dict) -> Iterator[tuple[str, object]]:
  """(path, leaf) of each leaf of a collection, the path as 'layers/attention/q'."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    yield "/".join(p.key for p in path), leaf


def is_stacked(path: str) -> bool:
  """Whether the leaf has a leading axis of layers."""
  return path.startswith("layers/")


def name(path: str, layer: int | None = None) -> str:
  """The name there of a leaf, or of one layer of it."""
  return _NAMES[path].format(layer)


def phase_name(path: str, layer: int) -> str:
  """The name in our own exports of a leaf of the collection 'phase': psc_q/up, psc_k/down, ..."""
  which, part = path.split("/")[-2:]
  return f"model.layers.{layer}.self_attn.{which.replace('psc', 'phase')}.{part}"


def shapes(params: dict) -> dict[str, tuple[int, ...]]:
  """{name: shape} there of a whole tree of parameters, or of their shapes."""
  out = {}
  for path, leaf in leaves(params):
    if not is_stacked(path):
      out[name(path)] = shape(path, leaf.shape)
      continue
    for layer in range(leaf.shape[0]):
      out[name(path, layer)] = shape(path, leaf.shape[1:])
  return out


def shape(path: str, ours: tuple[int, ...]) -> tuple[int, ...]:
  """The shape there of a leaf (of one layer of it)."""
  inputs = _inputs(path)
  if inputs is None:
    return ours if _is_unchanged(path) else (math.prod(ours),)
  return math.prod(ours[inputs:]), math.prod(ours[:inputs])


def to_hf(path: str, x):
  """A leaf (of one layer) in the layout there; numpy or jax."""
  there = shape(path, x.shape)
  return x.reshape(there) if _inputs(path) is None else x.reshape(there[::-1]).T


def from_hf(path: str, x, ours: tuple[int, ...]):
  """The inverse of `to_hf`, also of a box of the whole."""
  return x.reshape(ours) if _inputs(path) is None else x.T.reshape(ours)


def box(path: str, index: tuple[slice, ...], ours: tuple[int, ...]) -> tuple[slice, ...] | None:
  """The part there of a part of a leaf (of one layer), or None if it is no box there."""
  inputs = _inputs(path)
  if _is_unchanged(path):
    return index
  if inputs is None:
    flat = [_flat(index, ours)]
  else:
    flat = [_flat(index[inputs:], ours[inputs:]), _flat(index[:inputs], ours[:inputs])]
  return None if None in flat else tuple(flat)


def _is_unchanged(path: str) -> bool:
  return path == "embedding" or "psc_" in path


def _inputs(path: str) -> int | None:
  """How many leading axes of a matrix are inputs; None where the layout is the same."""
  last = path.rpartition("/")[2]
  if _is_unchanged(path) or last == "scale" or last.endswith("_bias"):
    return None
  return 2 if last == "o" else 1


def _flat(index: tuple[slice, ...], sizes: tuple[int, ...]) -> slice | None:
  """A part of some axes as a part of them flattened; only the first may be cut."""
  ranges = [s.indices(size)[:2] for s, size in zip(index, sizes)]
  if any(r != (0, size) for r, size in list(zip(ranges, sizes))[1:]):
    return None
  rest = int(np.prod(sizes[1:]))
  return slice(ranges[0][0] * rest, ranges[0][1] * rest)
