"""Hugging Face directories, read tensor by tensor: config.json and safetensors, nothing else.

No code, no pickles, no file outside the directory. All that can be wrong with names, shapes and
types is found in the headers, before any weight is read.
"""

from __future__ import annotations

import glob
import os

import numpy as np

from rope_jax import reading
from rope_jax import rope as rope_lib
from rope_jax.weights import families

INDEX = "model.safetensors.index.json"
MODEL_TYPE = "rope_jax"  # of our own exports with a learned phase, over a family of families.py
_DTYPES = ("F64", "F32", "F16", "BF16")

# Frequencies that older Llama checkpoints hold; they follow from the config.
_BUFFERS = ("rotary_emb.inv_freq",)


class HuggingFaceSource:
  """A directory with config.json and safetensors, in one file or in shards with an index.

  Attributes:
    path: the directory.
    hyperparameters: keys of config.model.
    rope: the rope that the model was made with.
    phase: of an export with PSC, what its config says of it; else {}.
    unread: names of tensors that are not understood.
    dtype: the smaller of config.model.param_dtype that holds all of it.
  """

  def __init__(self, path: str):
    self.path = path
    hf = reading.read_object(inside(path, "config.json"))
    self.phase = {}
    if hf.get("model_type") == MODEL_TYPE:
      self.phase = _phase(path, hf.get("phase"))
      hf = dict(hf, model_type=hf.get("base_model_type"))
    try:
      self.hyperparameters = families.read(hf)
      if hf["model_type"] == "phi3":  # transformers' default, which would be the maximum otherwise
        hf.setdefault("original_max_position_embeddings", 4096)
      # Where config.json is silent, the family's own default.
      self.rope = rope_lib.from_hf(dict(hf, head_dim=self.hyperparameters["head_dim"]))
    except ValueError as error:
      raise ValueError(f"{path}: config.json: {error}") from error
    self._tensors = _Files(path)
    self.dtype = "bfloat16" if self._tensors.dtypes == {"BF16"} else "float32"
    self._parts = self._fused() if hf["model_type"] == "phi3" else {}
    fused = {stored for stored, _ in self._parts.values()}
    names = set(self._tensors.shapes)
    self.unread = sorted(
      n for n in names - fused
      if n.endswith("_scale_inv") or not n.endswith((".weight", ".bias", ".up", ".down"))
    )  # fmt: skip
    self.unread = [n for n in self.unread if not n.endswith(_BUFFERS)]
    self._names = {n for n in names - fused if n not in self.unread and not n.endswith(_BUFFERS)}
    self._names |= set(self._parts)

  def names(self) -> set[str]:
    """Tensors, under the names of Llama."""
    return self._names

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, [out, in] of a matrix."""
    if name in self._parts:
      stored, rows = self._parts[name]
      return (rows.stop - rows.start, *self._tensors.shapes[stored][1:])
    return self._tensors.shapes[name]

  def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray:
    """A tensor, or a box of it, in the dtype that it is stored in."""
    shape = self.shape(name)
    ranges = [s.indices(n)[:2] for s, n in zip(box or (slice(None),) * len(shape), shape)]
    if name in self._parts:
      name, rows = self._parts[name]
      ranges[0] = tuple(rows.start + n for n in ranges[0])
    return self._tensors.read(name, tuple(slice(*r) for r in ranges))

  def _fused(self) -> dict[str, tuple[str, slice]]:
    """Phi-3's fused matrices as parts: {name: (stored, rows)}."""
    h = self.hyperparameters
    q, kv = h["num_heads"] * h["head_dim"], h["num_kv_heads"] * h["head_dim"]
    blocks = {
      "self_attn.qkv_proj": (("self_attn.q_proj", q), ("self_attn.k_proj", kv),
                             ("self_attn.v_proj", kv)),
      "mlp.gate_up_proj": (("mlp.gate_proj", h["d_ff"]), ("mlp.up_proj", h["d_ff"])),
    }  # fmt: skip
    out = {}
    for layer in range(h["num_layers"]):
      for block, parts in blocks.items():
        stored, first = f"model.layers.{layer}.{block}.weight", 0
        if stored not in self._tensors.shapes:
          continue  # reported as missing under the name of its part
        total = sum(rows for _, rows in parts)
        if self._tensors.shapes[stored][:1] != (total,):
          raise ValueError(
            f"{self.path}: {stored} has shape {self._tensors.shapes[stored]}, expected {total} rows"
          )
        for part, rows in parts:
          name = f"model.layers.{layer}.{part}.weight"
          out[name] = stored, slice(first, first + rows)
          first += rows
    return out


class _Files:
  """The tensors of all safetensors files of a directory."""

  def __init__(self, path: str):
    self.path, self._file_of, self.shapes, self.dtypes = path, {}, {}, set()
    index, wanted, one = os.path.join(path, INDEX), None, "model.safetensors"
    if os.path.lexists(index) and os.path.lexists(os.path.join(path, one)):
      raise ValueError(
        f"{path}: there are {one} and {INDEX}, which readers do not agree on; remove one of them"
      )
    if os.path.lexists(index):
      wanted = reading.read_object(inside(path, INDEX)).get("weight_map")
      if not isinstance(wanted, dict):
        raise ValueError(f"{path}: {INDEX} has no weight_map")
      found = sorted({self._plain(name, file) for name, file in wanted.items()})
    elif os.path.lexists(os.path.join(path, one)):
      found = [one]
    else:
      found = sorted(
        map(os.path.basename, glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
      )
    for file in found:
      self._add(file)
    for name, file in (wanted or {}).items():
      if self._file_of.get(name) != file:
        raise ValueError(f"{path}: {INDEX} says that {name!r} is in {file}, and it is not")
    if not self.shapes:
      raise ValueError(f"{path}: no tensors")

  def _plain(self, name: str, file) -> str:
    """The name of a shard, which must lie in the directory itself."""
    if not isinstance(file, str) or os.path.basename(file) != file or "\\" in file or not file:
      raise ValueError(
        f"{self.path}: {INDEX}: {file!r} (of {name!r}) is not a file of the directory"
      )
    if not file.endswith(".safetensors"):
      raise ValueError(f"{self.path}: {INDEX}: {file!r}: only safetensors are read, no pickles")
    if not os.path.isfile(os.path.join(self.path, file)):
      raise ValueError(f"{self.path}: shards are missing, e.g. {file} with {name!r}")
    return file

  def _add(self, file: str) -> None:
    with self._open(file) as handle:
      for name in handle.keys():  # noqa: SIM118 - it is no dict
        part = handle.get_slice(name)
        if name in self._file_of:
          raise ValueError(f"{self.path}: {name!r} is in {self._file_of[name]} and in {file}")
        if part.get_dtype() not in _DTYPES:
          raise ValueError(
            f"{self.path}: {name!r} is of type {part.get_dtype()}; only {', '.join(_DTYPES)} are "
            "read, so convert a quantised checkpoint first"
          )
        self._file_of[name], self.shapes[name] = file, tuple(part.get_shape())
        self.dtypes.add(part.get_dtype())

  def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
    # Opened for each tensor: a mapping that stays open keeps what was read through it in memory.
    file = self._file_of[name]
    with self._open(file) as handle, reading.foreign(self.path, f"{file}: {name!r} is damaged"):
      return handle.get_slice(name)[box]

  def _open(self, file: str):
    from safetensors import safe_open

    path = inside(self.path, file)
    reading.check_plain(path)
    with reading.foreign(self.path, f"{file} is damaged or no safetensors file"):
      return safe_open(path, framework="np")


def inside(directory: str, file: str) -> str:
  """The path of a file of a checkpoint, which may be a link only within the same download.

  Raises:
    ValueError: if it leads elsewhere.
  """
  path = os.path.join(directory, file)
  root = os.path.realpath(directory)
  if os.path.basename(os.path.dirname(root)) == "snapshots":  # of the hub's cache, beside its blobs
    root = os.path.dirname(os.path.dirname(root))
  if os.path.commonpath([root, os.path.realpath(path)]) != root:
    raise ValueError(f"{path} is a link to a file outside of the checkpoint")
  return path


def _phase(path: str, value) -> dict:
  """A phase as `phase` writes it."""
  settings = dict(psc=("calibration", ("pre", "post")), psc_rotation=("bound", None))
  kind = value.get("kind") if isinstance(value, dict) else None
  key, choices = settings.get(kind if isinstance(kind, str) else None, ("", None))
  given = value.get(key) if key else None
  good = given in choices if choices else isinstance(given, int | float) and given >= 0
  if not key or not good or not isinstance(value.get("share_heads"), bool):
    raise ValueError(f"{path}: config.json: phase={value!r} is none of rope_jax's")
  return value


def phase(r) -> dict:
  """What config.json of an export says of the learned phase of `config.rope`."""
  out = dict(kind=r.phase, share_heads=r[r.phase].share in ("heads", "all"))
  if r.phase == "psc":
    return out | dict(calibration=r.psc.calibration)
  return out | dict(bound=float(r.psc_rotation.bound))
