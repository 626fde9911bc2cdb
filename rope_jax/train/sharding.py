"""Which part of which array lives on which device: a mesh and rules over parameter paths."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rope_jax.model.attention import ROWS
from rope_jax.model.context import AXIS as CONTEXT
from rope_jax.model.context import check_split

AXES = (*ROWS, CONTEXT, "tensor")

# Weights are split over these together: the devices of a context would else all hold the same.
FULLY = ("fsdp", CONTEXT)

# First match wins; the path is that of the leaf in the tree of variables, layers stacked first.
# Adapters are small next to the base, but have optimizer state: they are split, too.
RULES = (
  (r"params/embedding$", P("tensor", FULLY)),
  (r"params/lm_head$", P(FULLY, "tensor")),
  (r"params/layers/.*/(q|k|v|gate|up)$", P(None, FULLY, "tensor")),
  (r"params/layers/.*/(q|k|v|gate|up)_bias$", P(None, "tensor")),
  (r"params/layers/attention/o$", P(None, "tensor", None, FULLY)),
  (r"params/layers/mlp/down$", P(None, "tensor", FULLY)),
  (r"lora/layers/.*/(q|k|v|gate|up)/a$", P(None, FULLY)),
  (r"lora/layers/.*/(q|k|v|gate|up)/b$", P(None, None, "tensor")),
  (r"lora/layers/.*/(o|down)/a$", P(None, "tensor")),
  (r"lora/layers/.*/(o|down)/b$", P(None, None, FULLY)),
  # The first of several that divides: a head may have fewer channels than a context devices.
  (r"phase/layers/.*/(up|down)$", (P(None, "tensor", "fsdp", CONTEXT), P(None, "tensor", "fsdp"))),
  (r".*", P()),
)


def make_mesh(mesh_config, batch_rows: int, *, must_divide: bool = True, devices=None) -> Mesh:
  """The mesh of `config.mesh`.

  Args:
    mesh_config: sizes of the axes. context = -1 takes the devices that the others leave; data = -1
      those of them that divide the batch, so that no row is computed twice.
    batch_rows: sequences of a micro-batch, which data * fsdp must divide.
    must_divide: False for evaluations, whose batches are replicated if they do not divide.
    devices: all devices of this run if None.

  Raises:
    ValueError: if the sizes do not fit the devices or the batch.
  """
  devices = jax.devices() if devices is None else devices
  data, fsdp = mesh_config.data, mesh_config.fsdp
  context, tensor = mesh_config.context, mesh_config.tensor
  if context == -1:
    data = max(data, 1)
    context, rest = divmod(len(devices), data * fsdp * tensor)
    if rest or not context:
      raise ValueError(
        f"config.mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not divide the "
        f"{len(devices)} devices, and context=-1 takes what they leave"
      )
  fixed = f"fsdp={fsdp} x context={context} x tensor={tensor}"
  left = len(devices) // (fsdp * context * tensor)
  several = len({device.process_index for device in devices}) > 1
  if data == -1:
    if len(devices) % (fsdp * context * tensor):
      raise ValueError(f"config.mesh: {fixed} does not divide the {len(devices)} devices")
    spread = several and not must_divide  # all take part, if only with copies
    data = left if spread else int(np.gcd(left, max(batch_rows // fsdp, 1)))
  shape = (data, fsdp, context, tensor)
  used = math.prod(shape)  # of whole numbers that do not wrap around
  if used > len(devices):
    raise ValueError(
      f"config.mesh: data={data} x {fixed} needs {used} devices, there are {len(devices)}"
    )
  if used < len(devices) and several:
    raise ValueError(
      f"config.mesh: data={data} x {fixed} uses {used} of {len(devices)} devices; several "
      "processes must use them all"
    )
  if must_divide and batch_rows % (data * fsdp):
    raise ValueError(
      f"config.train.batch_size / accumulation = {batch_rows} sequences cannot be split over "
      f"config.mesh.data={data} x fsdp={fsdp}"
    )
  # Axes that share a dimension of the torus are allowed: 8 x 8 on 4 x 4 x 4.
  grid = mesh_utils.create_device_mesh(shape, devices[:used], allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))  # Linen knows no other type


def check(c, mesh: Mesh, lengths: Sequence[int]) -> None:
  """What must divide what, before anything is compiled.

  Args:
    c: a config.
    mesh: that it runs on.
    lengths: of its sequences, tokens.

  Raises:
    ValueError: naming the keys and the numbers.
  """
  tensor = mesh.shape["tensor"]
  for key in ("num_heads", "num_kv_heads", "d_ff", "vocab_size"):
    if c.model[key] % tensor:
      raise ValueError(
        f"config.mesh.tensor={tensor} does not divide config.model.{key}={c.model[key]}"
      )
  shards = mesh.shape[CONTEXT]
  for length in lengths:
    check_split(length, shards, c.model.load_balance)
    if "splash" in c.model.attention:
      from rope_jax.model import splash

      gathers = shards > 1 and c.model.context_parallel == "all_gather"
      own = length // shards
      splash.block_size("block_q", own, c.model.block_q)
      splash.block_size("block_k", length if gathers else own, c.model.block_k)


def shardings(mesh: Mesh, tree):
  """A NamedSharding for each leaf of a tree of variables or of optimizer state.

  Raises:
    ValueError: naming the leaf whose dimension an axis does not divide.
  """

  def one(path, leaf):
    name = "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    specs = next(specs for rule, specs in RULES if re.search(rule, name))
    *preferred, last = [specs] if isinstance(specs, P) else specs
    for spec in preferred:
      with contextlib.suppress(ValueError):
        return NamedSharding(mesh, checked_spec(mesh, name, leaf.shape, spec))
    return NamedSharding(mesh, checked_spec(mesh, name, leaf.shape, last))

  return jax.tree_util.tree_map_with_path(one, tree)


def checked_spec(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> P:
  """The spec of an array, without axes on dimensions of 1, where there is nothing to split.

  Raises:
    ValueError: if an axis is named twice, or does not divide its dimension.
  """
  if not shape:  # a step count of the optimizer
    return P()
  entries = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
  flat = [axis for axes in entries for axis in axes]
  if len(set(flat)) < len(flat):
    raise ValueError(f"config.mesh: a rule splits {name} over an axis twice: {spec}")
  if len(entries) > len(shape):
    raise ValueError(f"config.mesh: a rule has {len(entries)} entries for {name} {shape}: {spec}")
  for size, axes in zip(shape, entries):
    parts = int(np.prod([mesh.shape[axis] for axis in axes]))
    if size > 1 and size % parts:
      sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
      raise ValueError(f"config.mesh: {sizes} does not divide dimension {size} of {name} {shape}")
  return P(*(axes if size > 1 else None for size, axes in zip(shape, entries)))


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
  """A batch [rows, tokens] over the devices; rows too few to split are given to all."""
  whole = rows is not None and rows % (mesh.shape["data"] * mesh.shape["fsdp"])
  return NamedSharding(mesh, P(None if whole else ROWS, CONTEXT))


def put_batch(make: Callable, shape: tuple[int, int], sharding: NamedSharding) -> dict:
  """A global batch, of which each process makes only the rows that its devices hold a part of.

  Args:
    make: slice of rows -> dict of numpy arrays [rows, tokens].
    shape: (rows, tokens) of the whole batch.
    sharding: of the arrays.
  """

  @functools.cache
  def part(start, stop):
    return make(slice(start, stop))

  def shard(key, index):
    start, stop, _ = index[0].indices(shape[0])
    return part(start, stop)[key][:, index[1]]

  index = next(iter(sharding.addressable_devices_indices_map(shape).values()))
  keys = part(*index[0].indices(shape[0])[:2])
  return {
    key: jax.make_array_from_callback(shape, sharding, functools.partial(shard, key))
    for key in keys
  }
