"""The header of a GGUF file, read with bounds: nothing in it is believed before it is checked.

`gguf.GGUFReader` trusts its counts: a hostile one makes it loop for hours, and a vocabulary costs
it two seconds. This walk refuses the one and takes a fraction of the other: arrays are located at
once and decoded when asked for. Format: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import functools
import os
import struct
from typing import NamedTuple

import numpy as np

from rope_jax import reading

# Quantisations whose layout `gguf.dequantize` reads, i.e. GGMLQuantizationType.
SUPPORTED = (
  *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
  *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type of the metadata -> struct and numpy code.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in _SCALARS.items()}

# Far above any model; they bound the time that a damaged count can cost.
_MOST = {"metadata entries": 1 << 16, "tensors": 1 << 20, "strings in an array": 1 << 22}
_LONGEST_NAME = (1 << 16) - 1


class Stored(NamedTuple):
  """A tensor of the file.

  Attributes:
    kind: name of its quantisation, one of `SUPPORTED`.
    shape: [out, in] or [out]; the file has the dimensions in the other order.
    offset: of its first byte in the file.
    block: (elements, bytes) of a block; rows are whole numbers of blocks.
  """

  kind: str
  shape: tuple[int, ...]
  offset: int
  block: tuple[int, int]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=object)) // self.block[0] * self.block[1]


class Header:
  """Metadata and places of the tensors, as `check` returns them.

  Attributes:
    path: of the file.
    data: uint8 [file size], mapped into memory.
    tensors: name -> Stored.
    keys: names of the metadata.
  """

  def __init__(self, path: str, data: np.ndarray, fields: dict, tensors: dict[str, Stored]):
    self.path, self.data, self.tensors = path, data, tensors
    self._fields = fields

  @property
  def keys(self):
    return self._fields.keys()

  def field(self, name: str, default=None):
    """The value of a metadata key as bool, int, float, str or list of one of these.

    Raises:
      ValueError: if a string is not UTF-8 or an array has booleans other than 0 and 1.
    """
    if name not in self._fields:
      return default
    kind, count, offset = self._fields[name]
    try:
      if kind == _STRING:
        return _strings(self.data, offset, count or 1)[0 if count is None else slice(None)]
      size = _SIZES[kind] * (count or 0)
      if count is None:
        return struct.unpack_from("<" + _SCALARS[kind], self.data, offset)[0]
      raw = self.data[offset : offset + size]
      if kind == _BOOL and raw.size and raw.max() > 1:
        raise ValueError("a boolean is neither 0 nor 1")
      return raw.view(np.dtype(_SCALARS[kind]).newbyteorder("<")).tolist()
    except ValueError as error:  # UnicodeDecodeError is one
      raise reading.refusal(self.path, f"metadata {name!r}: {error}") from error


def check(path: str) -> Header:
  """Walks the header of a GGUF file; no array is allocated and nothing of it is executed.

  Args:
    path: a file of version 2 or 3, little endian.

  Raises:
    ValueError: naming the file and what is wrong: not GGUF, truncated, a count, length or offset
      beyond the file, an unknown type, a name that is there twice, a quantisation not supported.
  """
  reading.check_plain(path)
  try:
    if not os.path.getsize(path):
      raise ValueError(f"{path}: the file is empty, not GGUF")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}") from error
  try:
    return _Walk(path, data).header()
  except _Wrong as error:
    raise reading.refusal(path, error) from error


class _Wrong(ValueError):
  """What is wrong, without the name of the file."""


class _Walk:
  def __init__(self, path: str, data: np.ndarray):
    self.path, self.data, self.end, self.at = path, data, data.size, 0

  def header(self) -> Header:
    if bytes(self.data[:4]) != b"GGUF":
      raise _Wrong("not a GGUF file: it does not begin with 'GGUF'")
    self.at = 4
    version = self.number("I", "the version")
    if version not in (2, 3):
      big = version & 0xFFFF == 0
      what = "it is big endian" if big else f"version {version}"
      raise _Wrong(f"{what}; versions 2 and 3, little endian, are supported")
    tensor_count = self.number("Q", "the number of tensors")
    field_count = self.number("Q", "the number of metadata entries")
    self.bounded("metadata entries", field_count, 8 + 4 + 1)
    self.bounded("tensors", tensor_count, 8 + 4 + 8 + 4 + 8)
    fields = {}
    for i in range(field_count):
      name = self.string(f"the name of metadata entry {i}")
      if name in fields:
        raise _Wrong(f"metadata {name!r} is there twice")
      fields[name] = self.value(name)
    infos = {}
    for i in range(tensor_count):
      name = self.string(f"the name of tensor {i}")
      if name in infos:
        raise _Wrong(f"tensor {name!r} is there twice")
      infos[name] = self.tensor_info(name)
    align = self.alignment(fields)
    start = -(-self.at // align) * align
    tensors = {name: self.place(name, info, start, align) for name, info in infos.items()}
    return Header(self.path, self.data, fields, tensors)

  def need(self, size: int, what: str) -> None:
    if size > self.end - self.at:
      raise _Wrong(
        f"truncated: {what} would be {size} bytes from byte {self.at}, the file ends at {self.end}"
      )

  def number(self, code: str, what: str) -> int | float:
    size = struct.calcsize("<" + code)
    self.need(size, what)
    (out,) = struct.unpack_from("<" + code, self.data, self.at)
    self.at += size
    return out

  def bounded(self, what: str, count: int, size: int) -> None:
    """That a count of things of at least `size` bytes can be true."""
    self.need(count * size, f"{count} {what}")
    if count > _MOST.get(what, count):
      raise _Wrong(f"{count} {what} are more than the {_MOST[what]} that are read")

  def string(self, what: str) -> str:
    length = self.number("Q", f"the length of {what}")
    self.need(length, what)
    if length > _LONGEST_NAME:
      raise _Wrong(f"{what} has {length} bytes")
    raw = bytes(self.data[self.at : self.at + length])
    self.at += length
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise _Wrong(f"{what} is not UTF-8") from error

  def value(self, name: str) -> tuple[int, int | None, int]:
    """(type of the value or of its items, number of items or None, offset); moves past it."""
    kind, count = self.number("I", f"the type of metadata {name!r}"), None
    if kind == _ARRAY:
      kind = self.number("I", f"the type of the items of metadata {name!r}")
      count = self.number("Q", f"the length of metadata {name!r}")
      if kind == _ARRAY:
        raise _Wrong(f"metadata {name!r} is an array of arrays")
    if kind != _STRING and kind not in _SCALARS:
      raise _Wrong(f"metadata {name!r} is of unknown type {kind}")
    offset = self.at
    if kind == _STRING:
      if count is not None:
        self.bounded("strings in an array", count, 8)
      self.skip_strings(1 if count is None else count, f"metadata {name!r}")
    else:
      size = _SIZES[kind] * (1 if count is None else count)
      self.need(size, f"metadata {name!r}")
      if kind == _BOOL and count is None and self.data[offset] > 1:
        raise _Wrong(f"metadata {name!r} is a boolean of value {self.data[offset]}")
      self.at += size
    return kind, count, offset

  def skip_strings(self, count: int, what: str) -> None:
    # Once for every token and merge: plain locals, no call but one.
    at, end, data, unpack = (
      self.at,
      self.end,
      memoryview(self.data),
      struct.Struct("<Q").unpack_from,
    )
    for i in range(count):
      if at + 8 > end:
        raise _Wrong(f"truncated: {what} ends within string {i} of {count}")
      at += 8 + unpack(data, at)[0]
    if at > end:  # lengths are not negative: once beyond, it stays beyond or stopped above
      raise _Wrong(f"truncated: {what} has a string that reaches beyond the end of the file")
    self.at = at

  def tensor_info(self, name: str) -> tuple[tuple[int, ...], int, int]:
    """(shape as [out, in], type, offset from the first tensor)."""
    dims = self.number("I", f"the rank of tensor {name!r}")
    if not 1 <= dims <= 4:
      raise _Wrong(f"tensor {name!r} has {dims} dimensions; 1 to 4 are possible")
    shape = [self.number("Q", f"dimension {i} of tensor {name!r}") for i in range(dims)]
    kind = self.number("I", f"the quantisation of tensor {name!r}")
    offset = self.number("Q", f"the offset of tensor {name!r}")
    return tuple(reversed(shape)), kind, offset

  def alignment(self, fields: dict) -> int:
    kind, count, offset = fields.get("general.alignment", (None, None, 0))
    if kind is None:
      return 32
    if kind != 4 or count is not None:
      raise _Wrong("general.alignment is not an unsigned 32-bit number")
    (align,) = struct.unpack_from("<I", self.data, offset)
    if align == 0 or align & (align - 1):
      raise _Wrong(f"general.alignment={align} is not a power of two")
    return align

  def place(self, name: str, info: tuple, start: int, align: int) -> Stored:
    shape, number, relative = info
    kind, block = _blocks().get(number, (None, None))
    if kind is None:
      raise _Wrong(f"unknown quantisation {number} of tensor {name!r}")
    if kind not in SUPPORTED:
      raise _Wrong(
        f"quantisation {kind} of tensor {name!r} is not supported; {', '.join(SUPPORTED)} are"
      )
    if 0 in shape or shape[-1] % block[0]:
      raise _Wrong(
        f"tensor {name!r} has shape {shape}: rows of {kind} are multiples of {block[0]} elements"
      )
    if relative % align:
      raise _Wrong(f"offset {relative} of tensor {name!r} is not a multiple of {align}")
    out = Stored(kind, shape, start + relative, block)
    if out.offset + out.nbytes > self.end:
      raise _Wrong(
        f"truncated: tensor {name!r} of shape {shape} and quantisation {kind} would be "
        f"{out.nbytes} bytes from byte {out.offset}, the file ends at {self.end}"
      )
    return out


@functools.cache
def _blocks() -> dict[int, tuple[str, tuple[int, int]]]:
  """Number of a quantisation -> its name and (elements, bytes) of a block."""
  import gguf

  return {int(kind): (kind.name, size) for kind, size in gguf.GGML_QUANT_SIZES.items()}


def _strings(data: np.ndarray, offset: int, count: int) -> list[str]:
  out, view, unpack = [], memoryview(data), struct.Struct("<Q").unpack_from
  for _ in range(count):
    stop = offset + 8 + unpack(view, offset)[0]
    out.append(str(view[offset + 8 : stop], "utf-8"))
    offset = stop
  return out
