"""Which part of which array lives on which device: a mesh and rules over parameter paths."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")

# First match wins; the path is that of the leaf in the tree of variables, layers stacked first.
# Adapters are small next to the base, but have optimizer state: they are split, too.
RULES = (
  (r"params/embedding$", P(None, "fsdp")),
  (r"params/lm_head$", P("fsdp", None)),
  (r"params/layers/.*/(q|k|v|gate|up)$", P(None, "fsdp")),
  (r"params/layers/attention/o$", P(None, None, None, "fsdp")),
  (r"params/layers/mlp/down$", P(None, None, "fsdp")),
  (r"lora/layers/.*/(q|k|v|gate|up)/a$", P(None, "fsdp")),
  (r"lora/layers/attention/o/b$", P(None, None, "fsdp")),
  (r"lora/layers/mlp/down/b$", P(None, None, "fsdp")),
  (r"phase/layers/.*/(up|down)$", P(None, None, "fsdp")),
  (r".*", P()),
)


def make_mesh(mesh_config, batch_rows: int, *, must_divide: bool = True) -> Mesh:
  """The mesh of `config.mesh` over all devices.

  Args:
    mesh_config: sizes of the axes; data = -1 takes the remaining devices.
    batch_rows: sequences of a micro-batch, which data * fsdp must divide.
    must_divide: False for evaluations, whose batches are replicated if they do not divide.

  Raises:
    ValueError: if the sizes do not fit the devices or the batch.
  """
  devices = jax.device_count()
  fsdp, data = mesh_config.fsdp, mesh_config.data
  if devices % fsdp:
    raise ValueError(f"config.mesh.fsdp={fsdp} does not divide the {devices} devices")
  if data == -1:
    # A batch smaller than the machine uses a part of it: no row is computed twice.
    data = int(np.gcd(devices // fsdp, max(batch_rows // fsdp, 1)))
  if data < 1 or data * fsdp > devices:
    raise ValueError(
      f"config.mesh: data={data} x fsdp={fsdp} needs {data * fsdp} devices, there are {devices}"
    )
  if must_divide and batch_rows % (data * fsdp):
    raise ValueError(
      f"config.train.batch_size / accumulation = {batch_rows} sequences cannot be split over "
      f"data={data} x fsdp={fsdp} devices"
    )
  used = jax.devices()[: data * fsdp]
  return jax.make_mesh((data, fsdp), AXES, devices=used, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(mesh: Mesh, tree):
  """A NamedSharding for each leaf of a tree of variables or of optimizer state.

  Raises:
    ValueError: naming the leaf whose dimension an axis does not divide.
  """

  def one(path, leaf):
    name = "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    spec = next(spec for rule, spec in RULES if re.search(rule, name))
    for size, axis in zip(leaf.shape, spec):
      if axis and size % mesh.shape[axis]:
        raise ValueError(
          f"config.mesh.{axis}={mesh.shape[axis]} does not divide dimension {size} of {name}"
        )
    return NamedSharding(mesh, spec if leaf.shape else P())

  return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over all devices."""
  return NamedSharding(mesh, P(AXES))


def put_rows(make: Callable, rows: int, sharding: NamedSharding) -> dict:
  """A global batch, of which each process makes only the rows that its devices hold.

  Args:
    make: slice of rows -> dict of numpy arrays.
    rows: of the whole batch.
    sharding: of the first axis.
  """
  made = {}

  def part(index):
    start, stop, _ = index[0].indices(rows)
    if (start, stop) not in made:
      made[start, stop] = make(slice(start, stop))
    return made[start, stop]

  index = next(iter(sharding.addressable_devices_indices_map((rows,)).values()))
  example = part(index)
  return {
    key: jax.make_array_from_callback(
      (rows, *x.shape[1:]), sharding, lambda index, key=key: part(index)[key]
    )
    for key, x in example.items()
  }
