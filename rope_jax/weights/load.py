"""From a checkpoint's tensors to our tree of parameters, sharded as they are read."""

from __future__ import annotations

import math

import jax
import numpy as np
from tqdm import tqdm

from rope_jax import reading, resolve
from rope_jax.weights import huggingface, names
from rope_jax.weights.source import open_source


def check(c) -> None:
  """Compares config.model and config.rope with the checkpoint of config.init_from.

  Raises:
    ValueError: naming the first key that differs, both values, and where they come from.
  """
  try:
    source = open_source(c.init_from)
  except ValueError as error:
    what = str(error).removeprefix(f"{c.init_from}: ")
    raise ValueError(f"config.init_from={c.init_from!r}: {what}") from error
  for key, value in source.hyperparameters.items():
    if key == "window" and value and c.model.window > value:
      continue  # a wider window is a way to extend a model; it needs no other weights
    if not _same(c.model[key], value):
      raise ValueError(f"config.model.{key}={c.model[key]!r}: {c.init_from} has {value!r}")
  _check_phase(c, source)
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


def _check_phase(c, source) -> None:
  """A learned phase that the checkpoint has must be that of the config."""
  if not source.phase:
    return
  kind, theirs = source.phase["kind"], dict(source.phase)
  if c.rope.phase != kind:
    raise ValueError(
      f"config.rope.phase={c.rope.phase!r}: {c.init_from} has the learned phase {kind!r}, which "
      "would be lost"
    )
  for key, value in huggingface.phase(c.rope).items():
    if value != theirs[key]:
      raise ValueError(
        f"config.rope.{kind}: {c.init_from} has {key}={theirs[key]!r}, not {value!r}"
      )


def _same(ours, theirs) -> bool:
  if isinstance(theirs, tuple):
    return set(ours) == set(theirs)
  return math.isclose(ours, theirs, rel_tol=1e-6)


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


def load_params(init_from: str, abstract: dict) -> dict:
  """Reads a base model into our tree.

  Tensor by tensor, and of each only the part that the devices of this process hold. Beside the
  parameters there is never more in memory than that part of the largest stacked leaf.

  Args:
    init_from: see `rope_jax.weights.locate`.
    abstract: tree of ShapeDtypeStruct of the collection 'params', with shardings or without.

  Returns:
    The tree, with every leaf from the checkpoint.

  Raises:
    ValueError: before anything is read, if a tensor is missing, has another shape, or is one that
      the model has no place for.
  """
  source = open_source(init_from)
  _check_tensors(source, abstract)
  return _load(source, abstract, names.name)


def load_phase(init_from: str, abstract: dict) -> dict:
  """Reads the collection 'phase' of an export of ours; {} from any other checkpoint.

  Raises:
    ValueError: if a tensor is missing or has another shape, or layers that share do not.
  """
  source = open_source(init_from)
  if not source.phase:
    return {}
  for path, leaf in names.leaves(abstract):
    layers = range(source.hyperparameters["num_layers"])
    shape = leaf.shape[1:] if names.is_stacked(path) else leaf.shape
    for layer in layers:
      name = names.phase_name(path, layer)
      if name not in source.names():
        raise ValueError(f"{source.path}: no tensor {name!r}")
      if source.shape(name) != shape:
        raise ValueError(f"{source.path}: {name} has shape {source.shape(name)}, the model {shape}")
    if not names.is_stacked(path):
      first, *others = (source.read(names.phase_name(path, layer)) for layer in layers)
      if any((x != first).any() for x in others):
        raise ValueError(
          f"{source.path}: config.rope.psc.share: its layers have phases of their own"
        )
  return _load(source, abstract, names.phase_name)


def _load(source, abstract: dict, name_of) -> dict:
  leaves = dict(names.leaves(abstract))
  total = sum(leaf.size for leaf in leaves.values())
  out = []
  with tqdm(total=total, desc="loading", unit=" parameters", unit_scale=True, leave=False,
            disable=None if jax.process_index() == 0 else True) as bar:  # fmt: skip
    for path, leaf in leaves.items():
      out.append(_load_leaf(source, path, leaf, name_of, bar))
  return jax.tree.unflatten(jax.tree.structure(abstract), out)


def _check_tensors(source, abstract: dict) -> None:
  expected, there = names.shapes(abstract), source.names()
  for name, shape in expected.items():
    if name not in there:
      raise ValueError(f"{source.path}: no tensor {name!r}")
    if source.shape(name) != shape:
      raise ValueError(f"{source.path}: {name} has shape {source.shape(name)}, the model {shape}")
  # A head beside tied embeddings is theirs, in every library. Anything else would be lost.
  tied = () if "lm_head.weight" in expected else ("lm_head.weight",)
  phase = {n for n in there if source.phase and ".self_attn.phase_" in n}  # `load_phase`
  lost = sorted(there - phase - set(expected) - set(tied)) + source.unread
  if lost:
    what = f"{len(lost)} tensors that this model has no place for, e.g. {lost[0]!r}"
    raise reading.refusal(source.path, what)


def _load_leaf(source, path: str, leaf, name_of, bar) -> jax.Array:
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  parts = sharding.addressable_devices_indices_map(leaf.shape).values()
  local = tuple(  # the part of this process: a box around those of its devices
    slice(min(p.indices(n)[0] for p in axis), max(p.indices(n)[1] for p in axis))
    for n, axis in zip(leaf.shape, zip(*parts))
  )
  buffer = np.empty([s.stop - s.start for s in local], leaf.dtype)
  if names.is_stacked(path):
    for layer in range(local[0].start, local[0].stop):
      part = _read(source, name_of(path, layer), path, local[1:], leaf.shape[1:])
      buffer[layer - local[0].start] = part
      bar.update(leaf.size // leaf.shape[0])
  else:
    buffer[...] = _read(source, name_of(path, 0), path, local, leaf.shape)
    bar.update(leaf.size)

  def shard(index):
    return buffer[tuple(
      slice(p.indices(n)[0] - s.start, p.indices(n)[1] - s.start)
      for p, n, s in zip(index, leaf.shape, local)
    )]  # fmt: skip

  # Waited for, so that the buffer is gone before the next one is there.
  return jax.make_array_from_callback(leaf.shape, sharding, shard).block_until_ready()


def _read(source, name: str, path: str, part: tuple[slice, ...], shape: tuple[int, ...]):
  """A part of a leaf (of one layer) in our layout."""
  box = names.box(path, part, shape)
  if box is None:
    return names.from_hf(path, source.read(name), shape)[part]
  return names.from_hf(path, source.read(name, box), tuple(s.stop - s.start for s in part))
