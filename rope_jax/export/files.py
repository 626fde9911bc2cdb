"""Files of an export: a directory that appears whole or not at all, weights in a stream.

The `safetensors` library writes a file from all of its tensors in memory; a shard of 5 GB would
be there twice. Its format is a header and bytes, so ours are written one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from rope_jax.weights.huggingface import INDEX

_DTYPES = dict(float32="F32", bfloat16="BF16")
_BYTES = dict(float32=4, bfloat16=2)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor to be written: its name, shape, dtype by name, and what makes it."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * _BYTES[self.dtype]


@contextlib.contextmanager
def new_directory(path: str, writes: bool = True) -> Iterator[str]:
  """A directory to write to, which gets its name when all is written, or else is removed.

  Args:
    path: of the directory to be; its parents are made.
    writes: False in processes that only take part in the computation.

  Raises:
    ValueError: if the path exists already.
  """
  if not writes:
    yield ""
    return
  path = os.path.abspath(path)
  if os.path.lexists(path):
    raise ValueError(f"--out={path} exists already; choose another, or move it away")
  parent = os.path.dirname(path)
  try:
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.partial-", dir=parent)
  except OSError as error:
    raise ValueError(f"--out={path}: {error.strerror}") from error
  try:
    os.chmod(partial, 0o777 & ~_umask())  # mkdtemp's are for their owner alone
    yield partial
    for entry in os.scandir(partial):
      _sync(entry.path)
    _sync(partial)
    os.rename(partial, path)
    _sync(parent)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def write_shards(
  directory: str, weights: dict[str, list[Tensor]], limit: int, progress
) -> list[str]:
  """Writes tensors as NAME.safetensors, or as several files with an index.

  Args:
    directory: an existing one; '' makes the tensors, which may take all processes, and writes none.
    weights: tensors by the name of their file. Where there are several names, or more bytes than
      the limit, files are numbered: a reader that finds model.safetensors looks for no other.
    limit: bytes of a file; a larger tensor has one of its own.
    progress: called with the bytes of each tensor.

  Returns:
    The names of the files.
  """
  files = {}
  for name, tensors in weights.items():
    shards = _split(tensors, limit)
    if len(weights) == len(shards) == 1:
      files[f"{name}.safetensors"] = tensors
      continue
    for i, part in enumerate(shards, 1):
      files[f"{name}-{i:05}-of-{len(shards):05}.safetensors"] = part
  for file, part in files.items():
    write(os.path.join(directory, file) if directory else "", part, progress)
  if len(files) == 1:
    return list(files)
  if directory:
    total = sum(t.nbytes for part in files.values() for t in part)
    where = {t.name: file for file, part in files.items() for t in part}
    index = dict(metadata=dict(total_size=total), weight_map=where)
    write_json(os.path.join(directory, INDEX), index)
  return [*files, INDEX]


def _split(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
  shards, size = [[]], 0
  for t in tensors:
    if shards[-1] and size + t.nbytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(t)
    size += t.nbytes
  return shards


def write(path: str, tensors: Iterable[Tensor], progress=lambda size: None) -> None:
  """One safetensors file, a tensor in memory at a time; with path '' nothing is written."""
  tensors, header, offset = list(tensors), {"__metadata__": {"format": "pt"}}, 0
  for t in tensors:
    header[t.name] = dict(
      dtype=_DTYPES[t.dtype], shape=list(t.shape), data_offsets=[offset, offset + t.nbytes]
    )
    offset += t.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") if path else contextlib.nullcontext() as f:
    if f:
      f.write(len(text).to_bytes(8, "little") + text)
    for t in tensors:
      x = t.make()
      if f:
        x = np.ascontiguousarray(x)
        if (str(x.dtype), x.shape) != (t.dtype, t.shape):
          raise TypeError(f"{t.name}: {x.dtype} {x.shape}, announced as {t.dtype} {t.shape}")
        f.write(memoryview(x.view(np.uint8).reshape(-1)))
      progress(t.nbytes)


def write_json(path: str, value) -> None:
  """Strict JSON, for people to read."""
  with open(path, "w", encoding="utf-8") as f:
    json.dump(value, f, indent=2, allow_nan=False, ensure_ascii=False)
    f.write("\n")


def _sync(path: str) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
