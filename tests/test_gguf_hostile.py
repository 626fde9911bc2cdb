"""Damaged and hostile GGUF files: refused with a ValueError that names the file, and at once."""

import os
import pickle
import struct
import time

import gguf
import gguf_files
import numpy as np
import pytest

from rope_jax.data import gguf_tokenizer
from rope_jax.weights.gguf_check import SUPPORTED, check
from rope_jax.weights.gguf_file import GGUFSource

SECONDS = 2.0  # for a file of a few kilobytes; one that hangs takes hours


def use(path):
  """Everything that a file is opened for."""
  source = GGUFSource(path)
  for name in source.names():
    assert source.read(name).shape == source.shape(name)
  tokenizer, _ = gguf_tokenizer.read(source)
  tokenizer.decode(tokenizer.encode("a b  abc\n\U0001f600").ids)


def attempt(path, message=""):
  """Uses a file that may be refused, but in no other way than by a ValueError with its name."""
  start = time.monotonic()
  try:
    use(path)
    refused = None
  except ValueError as error:
    refused = str(error)
  assert time.monotonic() - start < SECONDS
  if refused is not None:
    assert refused.startswith(f"{path}: "), refused
  return refused


def whole(path, model="gpt2", arch="llama"):
  pieces = ["<unk>", "<s>", "a", "b", "c", "ab", "abc", "Ġ", "Ġa", "▁", "▁a", "<0x0A>"]
  pieces += [f"t{i}" for i in range(61 - len(pieces))]
  fields = gguf_files.metadata(arch) | {
    "general.alignment": 64, "tokenizer.ggml.model": model, "tokenizer.ggml.tokens": pieces,
    "tokenizer.ggml.token_type": [2, 3] + [1] * 9 + [6] + [1] * 49,
    "tokenizer.ggml.scores": [-float(i) for i in range(61)],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
  }  # fmt: skip
  if model == "gpt2":
    fields["tokenizer.ggml.merges"] = ["a b", "ab c", "Ġ a"]
  state = gguf_files.state(num_layers=1)
  tensors = gguf_files.stored(arch, state, num_layers=1)
  fields[f"{arch}.block_count"] = 1
  q4 = gguf.GGMLQuantizationType.Q4_0
  raw = {"output.weight": (gguf.quantize(tensors.pop("output.weight"), q4), q4)}
  gguf_files.write(path, arch, tensors, fields, raw)
  return path.read_bytes()


def header_end(data):
  """The output is the last tensor: after its name come rank, two dimensions, type and offset."""
  return data.rindex(b"output.weight") + len("output.weight") + 4 + 2 * 8 + 4 + 8


@pytest.fixture
def damaged(tmp_path):
  path = tmp_path / "damaged.gguf"

  def write(data):
    path.write_bytes(data)
    return str(path)

  return write


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_whole_file_is_used(tmp_path, model):
  whole(tmp_path / "m.gguf", model)
  assert attempt(str(tmp_path / "m.gguf")) is None


def test_a_file_cut_anywhere_is_refused(tmp_path, damaged):
  data = whole(tmp_path / "m.gguf")
  used = max(t.offset + t.nbytes for t in check(str(tmp_path / "m.gguf")).tensors.values())
  assert 0 <= len(data) - used < 64  # the rest is padding
  path = damaged(data)
  os.truncate(path, used)
  assert attempt(path) is None
  cuts = [*range(header_end(data)), *range(header_end(data), used, 997), used - 1]
  for cut in reversed(cuts):
    os.truncate(path, cut)
    with pytest.raises(ValueError, match="damaged.gguf: (truncated|.*empty|not a GGUF)"):
      check(path)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_flipped_bytes_are_refused_or_read(tmp_path, damaged, model):
  data = whole(tmp_path / "m.gguf", model)
  rng, refused = np.random.default_rng(0), 0
  for i in range(400):
    changed = bytearray(data)
    for at in rng.integers(0, header_end(data), 1 + i % 3):
      changed[at] = rng.integers(0, 256) if i % 2 else changed[at] ^ (1 << rng.integers(0, 8))
    refused += attempt(damaged(changed)) is not None
  assert 100 < refused < 400


def test_every_long_number_of_the_header_may_be_huge(tmp_path, damaged):
  """Counts and lengths are 8 bytes; whatever they claim, the answer comes at once."""
  data = whole(tmp_path / "m.gguf")
  for i, value in enumerate((1 << 63, (1 << 64) - 1, 1 << 31, len(data))):
    for at in range(4 + i, header_end(data), 7):
      attempt(damaged(data[:at] + struct.pack("<Q", value) + data[at + 8 :]))


def text(s):
  return struct.pack("<Q", len(s)) + s.encode()


def made(fields=b"", field_count=0, tensors=b"", tensor_count=0, version=3, data=b""):
  """A file by hand, tensors aligned to 32 bytes."""
  head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, field_count) + fields + tensors
  return head + b"\0" * (-len(head) % 32) + data


def tensor(name="x", shape=(32,), kind=0, offset=0, rank=None):
  return text(name) + struct.pack(f"<I{len(shape)}QIQ", rank or len(shape), *shape, kind, offset)


def key(name, kind, *raw):
  return text(name) + struct.pack("<I", kind) + b"".join(raw)


ARRAY = struct.pack("<IQ", 9, 1)
F32 = bytes(128)
UNSUPPORTED = [k for k in gguf.GGMLQuantizationType if k.name not in SUPPORTED]


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "the file is empty"),
    (pickle.dumps(dict(a=[1, 2, 3] * 100)), "not a GGUF file"),
    (b"GGML" + bytes(100), "not a GGUF file"),
    (made(version=1), "version 1; versions 2 and 3"),
    (made(version=4), "version 4"),
    (made(version=3 << 24), "big endian"),
    (made(field_count=1 << 60), "truncated: .* metadata entries"),
    (made(tensor_count=1 << 60), "truncated: .* tensors"),
    (made(field_count=1 << 17, data=bytes(1 << 22)), "131072 metadata entries are more than"),
    (made(key("k", 13), 1, data=F32), "'k' is of unknown type 13"),
    (made(key("k", 9, struct.pack("<IQ", 13, 1)), 1, data=F32), "'k' is of unknown type 13"),
    (made(key("k", 9, ARRAY * 50), 1, data=F32), "'k' is an array of arrays"),
    (made(key("k", 9, struct.pack("<IQ", 0, 1 << 50)), 1), "truncated: metadata 'k'"),
    (made(key("k", 9, struct.pack("<IQ", 8, 1 << 50)), 1), "truncated: .* strings in an array"),
    (made(key("k", 9, struct.pack("<IQ", 8, 3), text("a"), struct.pack("<Q", 1 << 63)), 1,
          data=F32), "truncated: metadata 'k' ends within string 2"),
    (made(key("k", 8, struct.pack("<Q", 1 << 63)), 1), "a string that reaches beyond"),
    (made(key("k", 7, b"\2"), 1), "'k' is a boolean of value 2"),
    (made(key("k", 0, b"\1") * 2, 2), "metadata 'k' is there twice"),
    (made(struct.pack("<Q", 1) + b"\xff" + bytes(5), 1, data=F32), "entry 0 is not UTF-8"),
    (made(key("k" * 70_000, 0, b"\1"), 1), "name of metadata entry 0 has 70000 bytes"),
    (made(key("general.alignment", 4, struct.pack("<I", 24)), 1), "not a power of two"),
    (made(key("general.alignment", 4, bytes(4)), 1), "general.alignment=0"),
    (made(key("general.alignment", 10, bytes(8)), 1), "alignment is not an unsigned 32-bit"),
    (made(tensors=tensor() * 2, tensor_count=2, data=F32), "tensor 'x' is there twice"),
    (made(tensors=tensor(kind=99), tensor_count=1, data=F32),
     "unknown quantisation 99 of tensor 'x'"),
    (made(tensors=tensor(rank=5), tensor_count=1, data=F32), "'x' has 5 dimensions"),
    (made(tensors=tensor(shape=(1,) * 5), tensor_count=1, data=F32), "'x' has 5 dimensions"),
    (made(tensors=tensor(shape=()), tensor_count=1, data=F32), "'x' has 0 dimensions"),
    (made(tensors=tensor(shape=(0, 3)), tensor_count=1, data=F32), r"'x' has shape \(3, 0\)"),
    (made(tensors=tensor(shape=(33,)), tensor_count=1, data=F32), "truncated: tensor 'x'"),
    (made(tensors=tensor(shape=(1 << 62, 1 << 62)), tensor_count=1, data=F32), "truncated: ten"),
    (made(tensors=tensor(shape=(1 << 32, 1 << 32)), tensor_count=1, data=F32), "truncated: ten"),
    (made(tensors=tensor(shape=(16, 2), kind=2), tensor_count=1, data=F32), "multiples of 32"),
    (made(tensors=tensor(offset=8), tensor_count=1, data=F32), "offset 8 .* not a multiple of 32"),
    (made(tensors=tensor(offset=32), tensor_count=1, data=F32), "truncated: tensor 'x'"),
    (made(tensors=tensor(offset=1 << 63), tensor_count=1, data=F32), "truncated: tensor 'x'"),
    *((made(tensors=tensor(shape=(1024,), kind=k), tensor_count=1, data=F32 * 99),
       f"quantisation {k.name} of tensor 'x' is not supported") for k in UNSUPPORTED),
  ],
)  # fmt: skip
def test_what_cannot_be_true_is_named(damaged, data, message):
  start, path = time.monotonic(), damaged(data)
  with pytest.raises(ValueError, match=rf"damaged\.gguf: .*{message}"):
    check(path)
  assert time.monotonic() - start < SECONDS


def test_the_smallest_files_that_are_right_are_read(damaged):
  header = check(damaged(made(key("k", 7, b"\1"), 1, tensor(), 1, data=F32, version=2)))
  assert header.field("k") is True and header.tensors["x"].shape == (32,)
  fields = key("k", 9, struct.pack("<IQ", 8, 2), text("a"), text(""))
  assert check(damaged(made(fields, 1))).field("k") == ["a", ""]
  raw = key("k", 8, struct.pack("<Q", 1) + b"\xff") + key("b", 9, struct.pack("<IQ", 7, 2), b"\1\2")
  header = check(damaged(made(raw, 2)))
  for name in "kb":  # decoded when they are asked for
    with pytest.raises(ValueError, match=f"damaged.gguf: metadata '{name}'"):
      header.field(name)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
  for path in (tmp_path / "nothing.gguf", tmp_path):
    with pytest.raises(ValueError, match=str(path)):
      check(str(path))
