"""The tensors of an export, made from our variables one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rope_jax.export.files import Tensor
from rope_jax.model import attention
from rope_jax.weights import names


def merged(variables: dict, scale: float, dtype: str, *, fused: bool) -> list[Tensor]:
  """The base model with the low-rank products of its adapters in it.

  Args:
    variables: by collection; 'lora' may be missing.
    scale: alpha / rank.
    dtype: of the tensors, 'float32' or 'bfloat16'.
    fused: whether queries, keys and values, and gate and up, are one matrix each (Phi-3).
  """
  lora = dict(names.leaves(variables.get("lora", {})))
  out = []
  for path, leaf in names.leaves(variables["params"]):
    adapter = tuple(lora[f"{path}/{x}"] for x in "ab") if f"{path}/a" in lora else None
    stacked = names.is_stacked(path)
    for layer in range(leaf.shape[0]) if stacked else [None]:
      shape = names.shape(path, leaf.shape[1:] if stacked else leaf.shape)
      make = functools.partial(_make, leaf, adapter, layer, path, scale, dtype)
      out.append(Tensor(names.name(path, layer), shape, dtype, make))
  out.sort(key=_order)
  return _fused(out) if fused else out


def adapters(lora: dict, dtype: str) -> list[Tensor]:
  """LoRA alone under the names of PEFT: A [rank, in] and B [out, rank] of each matrix."""
  out = []
  for path, leaf in names.leaves(lora):
    matrix, _, which = path.rpartition("/")
    for layer in range(leaf.shape[0]):
      name = names.name(matrix, layer).removesuffix(".weight")
      shape = (leaf.shape[-1], int(np.prod(leaf.shape[1:-1])))  # [in..., rank]
      if which == "b":  # [rank, out...]
        shape = (int(np.prod(leaf.shape[2:])), leaf.shape[1])
      make = functools.partial(_reshaped, leaf, layer, shape, dtype)
      name = f"base_model.model.{name}.lora_{which.upper()}.weight"
      out.append(Tensor(name, shape, dtype, make))
  return sorted(out, key=_order)


def phase(variables: dict, num_layers: int) -> list[Tensor]:
  """PSC's parameters, float32, for each layer, those that layers share in each of them."""
  out = []
  for path, leaf in names.leaves(variables):
    stacked = names.is_stacked(path)
    for layer in range(num_layers):
      shape = leaf.shape[1:] if stacked else leaf.shape
      make = functools.partial(_layer_of, leaf, layer if stacked else None)
      out.append(Tensor(names.phase_name(path, layer), shape, "float32", make))
  return sorted(out, key=_order)


def _make(leaf, adapter, layer, path: str, scale: float, dtype: str) -> np.ndarray:
  return _host(_tensor(leaf, adapter, layer, path=path, scale=scale, dtype=dtype))


@functools.partial(jax.jit, static_argnames=("path", "scale", "dtype"))
def _tensor(leaf, adapter, layer, *, path: str, scale: float, dtype: str):
  x = leaf if layer is None else leaf[layer]
  if adapter is not None:
    a, b = (y[layer].astype(jnp.float32) for y in adapter)
    product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    x = x.astype(jnp.float32) + scale * product
  return _everywhere(names.to_hf(path, x).astype(dtype))


def _reshaped(leaf, layer: int, shape: tuple[int, int], dtype: str) -> np.ndarray:
  """[in..., rank] or [rank, out...] of a layer, transposed."""
  return _host(_part(leaf, layer)).reshape(shape[::-1]).T.astype(dtype)


def _layer_of(leaf, layer: int | None) -> np.ndarray:
  return _host(_part(leaf, layer))


@jax.jit
def _part(leaf, layer):
  return _everywhere(leaf if layer is None else leaf[layer])


def _everywhere(x):
  return jax.lax.with_sharding_constraint(x, P()) if attention.mesh_shape() else x


def _host(x) -> np.ndarray:
  return np.asarray(jax.device_get(x))


def _order(tensor: Tensor):
  """Layers by number, whatever is not of a layer first, the head last."""
  parts = [int(p) if p.isdigit() else -1 for p in tensor.name.split(".")]
  return tensor.name.startswith(("lm_head", "model.norm")), max(parts), tensor.name


def _fused(tensors: list[Tensor]) -> list[Tensor]:
  """Phi-3's matrices: the rows of several one after the other."""
  by_name, out = {t.name: t for t in tensors}, []
  blocks = {"q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
            "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj"))}  # fmt: skip
  parts = {part for _, group in blocks.values() for part in group}
  for t in tensors:
    last = t.name.split(".")[-2]
    if last in blocks:
      fused, group = blocks[last]
      of = [by_name[t.name.replace(last, part)] for part in group]
      shape = (sum(p.shape[0] for p in of), *t.shape[1:])
      make = functools.partial(_stacked, [p.make for p in of])
      out.append(Tensor(t.name.replace(last, fused), shape, t.dtype, make))
    elif last not in parts:
      out.append(t)
  return out


def _stacked(makers: list[Callable]) -> np.ndarray:
  return np.concatenate([make() for make in makers])
