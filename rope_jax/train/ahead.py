"""A training step compiled for a TPU slice that need not exist: memory, work, communication, time.

The compiler is the real one (libtpu); nothing is executed and no array is made.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from rope_jax import config as config_lib
from rope_jax import evals, resolve
from rope_jax.data.batches import KEYS
from rope_jax.model import context
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train import chips, flops, hlo, sharding, state
from rope_jax.train import step as step_lib
from rope_jax.train.optimizer import optimizer

# Matrix products of a splash kernel for each pair of a query and a key; dkv makes all gradients in
# five if there is no dq.
_PRODUCTS = dict(fwd=2, dq=3, dkv=4)


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice: its name, the chip of one device, and abstract devices."""

  name: str
  chip: chips.Chip
  devices: tuple


def tpu_slice(name: str) -> Slice:
  """The slice of a topology name, e.g. 'v5p:4x4x4'.

  Raises:
    ValueError: if libtpu is not installed or does not know the name.
  """
  generation = name.partition(":")[0]
  wanted = f"one of {', '.join(chips.CHIPS)} and its shape, e.g. v5p:4x4x4 or v5e:16x16"
  if generation not in chips.CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", name.partition(":")[2]):
    raise ValueError(f"--topology={name}: expected {wanted}")
  try:
    # As on Cloud TPU: the two cores of a v4 are one device.
    options = dict(chip_config_name="megacore") if generation == "v4" else {}
    devices = topologies.get_topology_desc(name, "tpu", **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"--topology={name}: expected {wanted}; {_first_line(error)}") from error
  except RuntimeError as error:
    raise ValueError(
      f"--topology={name}: the TPU compiler is not here ({_first_line(error)}); "
      "pip install -e '.[tpu]'"
    ) from error
  return Slice(name, chips.CHIPS[generation], tuple(devices))


def lower(c, mesh):
  """The training step of a config, lowered for a mesh, from shapes alone."""
  with jax.set_mesh(mesh):
    tx, rope = optimizer(c.train), resolve.training_rope(c)
    trainable, frozen = state.split(c, state.abstract_variables(c, mesh))
    opt_state = state.placed(mesh, jax.eval_shape(tx.init, trainable))
    split = sharding.batch_sharding(mesh)
    shape = (c.train.batch_size, config_lib.train_length(c))
    batch = {
      key: jax.ShapeDtypeStruct(shape, np.float32 if key == "weights" else np.int32, sharding=split)
      for key in KEYS
    }
    # What some arrangements of positions add (rope_jax/data/arrange.py).
    if c.data.positions in ("e2_llm", "clex"):
      batch["fractions"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=split)
    if c.data.positions == "mixed":
      batch["short"] = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=split)
    step = step_lib.train_step(
      Llama(from_config(c)),
      tx,
      accumulation=c.train.accumulation,
      chunk=c.train.loss_chunk,
      placement=jax.tree.map(lambda x: x.sharding, (trainable, opt_state)),
    )
    return step.lower(trainable, opt_state, frozen, batch, rope)


def report(c, tpu: Slice) -> dict:
  """What the training step of a config needs on a slice; plain numbers, as for JSON.

  Bytes, FLOPs and seconds are those of one device and one step. `fits` is False if the compiler
  itself found no way into the memory; then all that is known is how much it wanted. Loops whose
  length depends on data, as those of blockwise attention, are in `unknown_loops`; then there is no
  time.

  Args:
    c: a config, validated for 'tpu'.
    tpu: from `tpu_slice`.

  Raises:
    ValueError: if the config does not fit the mesh, or the mesh the slice.
  """
  rows = c.train.batch_size // c.train.accumulation
  mesh = sharding.make_mesh(c.mesh, rows, devices=tpu.devices)
  length = config_lib.train_length(c)
  sharding.check(c, mesh, [length, *evals.lengths(c)])
  out = dict(
    topology=tpu.name,
    devices=len(tpu.devices),
    mesh=dict(mesh.shape),
    batch=dict(sequences=c.train.batch_size, accumulation=c.train.accumulation, length=length),
    **{k: c.model[k] for k in ("attention", "context_parallel", "load_balance", "remat")},
    hbm=tpu.chip.hbm,
    model_flops=_model_flops(c, mesh.size),
    model_flops_6n=_model_flops(c, mesh.size, all_trained=True),
  )
  began = time.perf_counter()
  lowered = lower(c, mesh)
  out["lower_seconds"] = time.perf_counter() - began
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return dict(out, fits=False, error=_first_line(error))
  out["compile_seconds"] = time.perf_counter() - began
  out |= _memory(compiled, tpu.chip)
  cost = hlo.analyse(compiled.as_text(), mesh.shape)
  kernel_flops = _kernel_flops(c, mesh, cost.kernels)
  total = cost.matmul_flops + kernel_flops
  out |= dict(
    matmul_flops=cost.matmul_flops,
    kernel_flops=kernel_flops,
    compiled_flops=total,
    memory_bytes=cost.memory_bytes,
    collectives=[dataclasses.asdict(x) for x in cost.collectives],
    unknown_loops=cost.unknown_loops,
  )
  if cost.unknown_loops:  # what they compute counts once: no time follows from it
    return out
  heads = c.model.num_kv_heads // mesh.shape["tensor"]
  seconds = dict(
    compute=total / tpu.chip.flops,
    memory=cost.memory_bytes / tpu.chip.hbm_bandwidth,
    network=_network_seconds(
      cost.collectives, tpu, len(context.ways(heads, mesh.shape["context"]))
    ),
  )
  bound = max(seconds, key=seconds.get)
  return out | dict(
    model_share=out["model_flops"] / total,
    seconds=seconds,
    step_seconds=seconds[bound],
    bound=bound,
    mfu=out["model_flops"] / tpu.chip.flops / seconds[bound],
    tokens_per_second=c.train.batch_size * length / seconds[bound],
  )


def candidates(c, tpu: Slice, *, remat, accumulation, tensor) -> list[list]:
  """Configs that differ in mesh and rematerialisation: for each mesh, from frugal to fast.

  Meshes have data = 1, as fsdp splits a batch, too, and stores less.

  Args:
    c: a config.
    tpu: from `tpu_slice`.
    remat, accumulation, tensor: values of config.model.remat, in the order of the memory that they
      take, of config.train.accumulation, and of config.mesh.tensor.

  Raises:
    ValueError: if no mesh fits the config.
  """
  out, reason = [], None
  for micro, parts in itertools.product(accumulation, tensor):
    rows = c.train.batch_size // micro
    for fsdp in (n for n in range(1, rows + 1) if rows % n == 0):
      group = []
      for policy in remat:
        new = copy.deepcopy(c)
        new.train.accumulation, new.model.remat = micro, policy
        new.mesh.update(data=1, fsdp=fsdp, context=-1, tensor=parts)
        group.append(new)
      try:
        mesh = sharding.make_mesh(new.mesh, rows, devices=tpu.devices)
        if mesh.size < len(tpu.devices):
          raise ValueError(f"config.mesh: {dict(mesh.shape)} leaves devices without work")
        sharding.check(c, mesh, [config_lib.train_length(c), *evals.lengths(c)])
        state.abstract_variables(c, mesh)
      except ValueError as error:
        reason = error
        continue
      for new in group:
        new.mesh.update(dict(mesh.shape))
      out.append(group)
  if not out:
    raise ValueError(f"config.mesh: no mesh of {len(tpu.devices)} devices fits; the last: {reason}")
  return out


def _model_flops(c, devices: int, all_trained: bool = False) -> float:
  """Of a step, what the model itself needs, on each device; with 6N as if all were trained."""
  m, length = from_config(c), config_lib.train_length(c)
  shapes = jax.eval_shape(lambda: state.init(c))
  adapters = sum(x.size for k in shapes if k != "params" for x in jax.tree.leaves(shapes[k]))
  trained = all_trained or c.train.trainable == "all"
  per_token = flops.train_flops_per_token(m, length, adapters, base_is_trained=trained)
  return per_token * c.train.batch_size * length / devices


def _memory(compiled, chip: chips.Chip) -> dict:
  stats, planned = compiled.memory_analysis(), step_lib.planned_bytes(compiled)
  return dict(
    bytes=dict(planned, peak=stats.peak_memory_in_bytes),
    host_bytes=stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    fits=planned["total"] <= chip.hbm,
  )


def _kernel_flops(c, mesh, kernels: list[hlo.Kernel]) -> float:
  """The compiler does not look into kernels: blocks that splash computes, times its products."""
  from rope_jax.model import splash

  shards, total = mesh.shape["context"], 0.0
  fused = not any("_dq" in kernel.name for kernel in kernels)
  for kernel in kernels:
    phase = next((p for p in _PRODUCTS if f"_{p}" in kernel.name), None)
    if not kernel.name.startswith("splash") or phase is None:
      raise ValueError(f"config.model.attention: the FLOPs of kernel {kernel.name} are not known")
    arrays = [shape for dtype, shape in kernel.operands if len(shape) >= 3 and dtype[0] in "bf"]
    (*heads, tokens, head_dim), keys = arrays[0], arrays[1][-2]
    tiles = flops.attention_tiles(
      tokens * shards,
      shards,
      strategy=c.model.context_parallel,
      balanced=c.model.load_balance,
      block_q=splash.block_size("block_q", tokens, c.model.block_q),
      block_k=splash.block_size("block_k", keys, c.model.block_k),
      window=c.model.window,
    )
    hops = shards if c.model.context_parallel == "ring" else 1
    products = 5 if phase == "dkv" and fused else _PRODUCTS[phase]
    total += kernel.calls / hops * tiles * products * 2 * head_dim * np.prod(heads)
  return float(total)


def _network_seconds(collectives: list[hlo.Collective], tpu: Slice, ways: int) -> float:
  """Time of the busiest mesh axis.

  Each mesh axis is taken as a ring with two links a device, both of them busy, but for permutes,
  which use as many as `context.ring` has ways. That is a slice with wrap-around links, and axes
  that do not share a dimension of the torus.
  """
  seconds: dict[tuple, float] = {}
  for x in collectives:
    links = ways if x.kind == "collective-permute" else 2
    busy = x.bytes / (links * tpu.chip.link_bandwidth * max(len(x.axes), 1))
    for axis in x.axes:
      seconds[axis] = seconds.get(axis, 0.0) + busy
  return max(seconds.values(), default=0.0)


def _first_line(error) -> str:
  return str(error).strip().splitlines()[0][:300]
