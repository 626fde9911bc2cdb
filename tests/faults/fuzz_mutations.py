"""Ways to damage a file: functions of a random generator and the good bytes.

Structure-aware ones know JSON, the header of safetensors and the metadata of GGUF.
"""

import copy
import json
import os
import pickle

import numpy as np

BOMB = "executed"  # the directory that a payload would make


class Bomb:
  def __reduce__(self):
    return os.mkdir, (BOMB,)


def one(rng, values):
  """One of them, of which no change reaches the others."""
  return copy.deepcopy(some(rng, values))


def some(rng, values):
  return values[rng.integers(len(values))]


# ---- Bytes.


def flip(rng, data: bytearray, end: int) -> None:
  for at in rng.integers(0, end, rng.integers(1, 5)):
    data[at] ^= 1 << rng.integers(8)


def replace(rng, data: bytearray, end: int) -> None:
  at, n = rng.integers(end), rng.integers(1, 9)
  data[at : at + n] = some(rng, (bytes(n), b"\xff" * n, rng.bytes(n), b'"' * n, b"\n" * n))


def cut(rng, data: bytearray, end: int) -> None:
  del data[rng.integers(len(data) if rng.random() < 0.5 else end) :]


def insert(rng, data: bytearray, end: int) -> None:
  at, n = rng.integers(end), int(rng.integers(1, 4096 if rng.random() < 0.3 else 9))
  data[at:at] = some(rng, (bytes(n), rng.bytes(n), b"[" * n, b"0" * n, b"\n" * n, b"\xef\xbb\xbf"))


def remove(rng, data: bytearray, end: int) -> None:
  at = rng.integers(end)
  del data[at : at + rng.integers(1, 64)]


def block(rng, data: bytearray, end: int) -> tuple[int, int]:
  at = int(rng.integers(end))
  return at, at + int(rng.integers(1, 1 + max(1, end // 4)))


def duplicate(rng, data: bytearray, end: int) -> None:
  a, b = block(rng, data, end)
  data[a:a] = data[a:b]


def swap(rng, data: bytearray, end: int) -> None:
  (a, b), (c, d) = sorted((block(rng, data, end), block(rng, data, end)))
  b = min(b, c)
  data[a:d] = data[c:d] + data[b:c] + data[a:b]


def zero(rng, data: bytearray, end: int) -> None:
  a, b = block(rng, data, end)
  data[a:b] = bytes(len(data[a:b]))


BYTES = (flip, flip, replace, replace, cut, insert, remove, duplicate, swap, zero)


def damaged(rng, data: bytes, end: int = 0) -> bytes:
  """One to three kinds of damage, most of them before byte `end`, where the header ends."""
  out = bytearray(data)
  for _ in range(some(rng, (1, 1, 1, 2, 3))):
    if out:
      limit = min(end, len(out)) if end and rng.random() < 0.8 else len(out)
      some(rng, BYTES)(rng, out, limit)
  return bytes(out)


# ---- JSON, as text that no parser has agreed to yet.

_DEEP, _HUGE, _TWICE = "@deep@", "@huge@", "@twice@"
VALUES = (
  None, True, False, -1, 0, 1, 3, 2**30, 2**31 - 1, 2**40, 2**63, -(2**63), 10**400, 0.5, -1.5,
  1e308, 1e-320, float("nan"), float("inf"), float("-inf"), "", "x", "1", "nan", "x" * 20_000,
  "\ud800", "a\nb", "a\u2028b\x1b[2J", "../x", "/etc/passwd", [], [1], [[]], [None], ["x"], {},
  {"a": 1}, {"": {}}, [0] * 5000, _DEEP + "5000", _DEEP + "400", _DEEP + "90", _HUGE,
)  # fmt: skip


def nodes(value, found=None) -> list[tuple]:
  """(container, key) of all that is inside a value."""
  found = [] if found is None else found
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inside in items:
    found.append((value, key))
    if isinstance(inside, dict | list):
      nodes(inside, found)
  return found


def json_edit(rng, value) -> str:
  """The text of a value with one to three changes to its structure."""
  holder = [json.loads(json.dumps(value))]
  for _ in range(some(rng, (1, 1, 1, 1, 2, 3))):
    change(rng, holder)
  return text(holder[0])


def change(rng, holder: list) -> None:
  places = nodes(holder)
  # The nodes near the root decide more than the many numbers at the leaves.
  container, key = some(rng, places[: 1 + len(places) // (1 if rng.random() < 0.6 else 4)])
  what, old = rng.integers(10), container[key]
  if what < 4:
    container[key] = one(rng, VALUES)
  elif what > 7:
    container[key] = near(rng, old)
  elif what == 4 and container is not holder:
    del container[key]
  elif what == 5 and isinstance(container, dict):
    container[key + _TWICE] = one(rng, VALUES)
  elif what == 6 and isinstance(container, dict):
    del container[key]
    container[some(rng, ("", "x", "a\nb", "\ud800", "..", key.upper(), "k" * 3000))] = old
  else:
    other, place = some(rng, places)
    container[key] = some(rng, ([old], {"a": old}, json.loads(json.dumps(other[place]))))


def near(rng, old):
  """A value of the same kind."""
  if isinstance(old, bool):
    return not old
  if isinstance(old, int | float) and abs(old) < 1e300:
    return some(rng, (old + 1, -old, 2 * old, old / 2, float(old), old * 10**6))
  if isinstance(old, str):
    return some(rng, (old + " ", old[:-1], old * 2, old.upper(), "\U0001f600"))
  if isinstance(old, dict):
    return dict(reversed(old.items()))
  return old[::-1] if isinstance(old, list) else 0


def text(value) -> str:
  out = json.dumps(value).replace(_TWICE, "").replace(f'"{_HUGE}"', "9" * 5000)
  for depth in (5000, 400, 90):
    out = out.replace(f'"{_DEEP}{depth}"', "[" * depth + "]" * depth)
  return out


# ---- Formats.


def json_file(rng, data: bytes) -> bytes:
  return json_edit(rng, json.loads(data)).encode()


def json_lines(rng, data: bytes) -> bytes:
  lines = data.decode().splitlines()
  at = rng.integers(len(lines))
  lines[at] = json_edit(rng, json.loads(lines[at]))
  return ("\n".join(lines) + "\n").encode()


def table(rng, data: bytes) -> bytes:
  """CSV with a cell, or a row, of another kind."""
  rows = [row.split(",") for row in data.decode().splitlines()]
  row = rows[rng.integers(len(rows))]
  cells = ("", "nan", "inf", "-inf", "x", "1e999", "-1", "0", "1_0", '"', '"1\n2"', "\0",
           "9" * 140_000, " 1.5 ", "１", "1;2", "a\nb", "\x85")  # fmt: skip
  row[rng.integers(len(row))] = some(rng, cells)
  if rng.random() < 0.3:
    rows.append(row[:-1] * rng.integers(3))
  return some(rng, ("\n", "\r\n", "\r")).join(",".join(r) for r in rows).encode()


# Parts of tokenizers that do nothing good; the first takes a regular expression for ever to match.
PARTS = (
  dict(type="Split", pattern=dict(Regex="(x+x+)+y"), behavior="Isolated", invert=False),
  dict(type="Split", pattern=dict(Regex="("), behavior="Isolated", invert=False),
  dict(type="Split", pattern=dict(String=""), behavior="Removed", invert=True),
  dict(type="Split", pattern=dict(Regex=""), behavior="MergedWithNext", invert=False),
  dict(type="FixedLength", length=0), dict(type="CharDelimiterSplit", delimiter="x"),
  dict(type="Replace", pattern=dict(String=""), content="xx"),
  dict(type="Replace", pattern=dict(Regex="x|"), content=""),
  dict(type="Strip", content="x", start=2**40, stop=2**40),
  dict(type="Strip", strip_left=True, strip_right=True), dict(type="Fuse"),
  dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=False),
  dict(type="Sequence", pretokenizers=[], normalizers=[], decoders=[], processors=[]),
  dict(type="TemplateProcessing", single=[], pair=[], special_tokens={}),
  dict(type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<no>", type_id=0))], pair=[],
       special_tokens={"<no>": dict(id="<no>", ids=[2**31], tokens=["<no>"])}),
  dict(type="BertProcessing", sep=["x", 2**31], cls=["x", 77]), dict(type="NFC"), dict(type="CTC"),
  dict(type="Precompiled", precompiled_charsmap="AAAA"),
  dict(type="WordPiece", prefix="", cleanup=True),
)  # fmt: skip


def tokenizer_file(rng, data: bytes) -> bytes:
  """With parts that the library takes, and falls over."""
  whole = json.loads(data)
  for _ in range(some(rng, (1, 1, 2))):
    place = some(rng, ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"))
    if place == "model":
      key = some(rng, [k for k in whole["model"] if k != "type"])
      whole["model"][key] = some(
        rng, (None, "<no>", 0.5, 7, 2**31, [], {}, [["a", -1.0]], {"a": 9})
      )
    else:
      whole[place] = one(rng, PARTS)
  return json.dumps(whole).encode()


DTYPES = ("F64", "F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "F4", "", 3)


def safetensors_file(rng, data: bytes) -> bytes:
  """Another header before the same data."""
  size = int.from_bytes(data[:8], "little")
  header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
  for _ in range(rng.integers(1, 3)):
    name = some(rng, [k for k in header if isinstance(header[k], dict)] or [""])
    entry, what = header.get(name), rng.integers(7)
    if not isinstance(entry, dict) or "shape" not in entry:
      continue
    if what == 0:
      entry["dtype"] = some(rng, DTYPES)
    elif what == 1:
      entry["shape"] = some(rng, ([], [0], [1, *entry["shape"]], entry["shape"][::-1], [-1],
                                  [2**62, 4], entry["shape"] * 40, [1.5]))  # fmt: skip
    elif what == 2:
      at = rng.integers(2)
      entry["data_offsets"][at] += int(some(rng, (-4, 4, 1, 2**40, -(2**40), 2**63)))
    elif what == 3:
      header[some(rng, ("../x.weight", "a\nb.weight", "\ud800.weight", "", "n" * 5000 + ".weight",
                        "model.layers.99.mlp.up_proj.weight"))] = header.pop(name)  # fmt: skip
    elif what == 4:
      header["__metadata__"] = one(rng, VALUES)
    elif what == 5:
      header[name + _TWICE] = dict(entry)
    else:
      change(rng, [header])
  new = text(header).encode()
  claimed = len(new) + int(some(rng, (0, 0, 0, 0, 1, -1, 8, 2**30, 2**62)))
  return claimed.to_bytes(8, "little") + new + rest


GGUF_VALUES = (0, 1, 2, 7, 10_000, 2**20, 2**30, 2**32 - 1, True, False, "", "x", "a\nb",
               "x" * 20_000, 0.0, -1.0, 1e30, float("nan"), float("inf"), [1, 2], ["a", "b"],
               ["a", "a"], [0.5], ["x" * 3000])  # fmt: skip


def gguf_file(rng, parts: tuple, write) -> bytes:
  """A file that is written as it should be, of metadata that cannot be."""
  arch, fields, *rest = parts
  fields = dict(fields)
  for _ in range(rng.integers(1, 3)):
    key = some(rng, list(fields))
    what = rng.integers(6)
    if what == 0:
      del fields[key]
    elif what == 1 and isinstance(fields[key], list):
      fields[key] = [*fields[key]]
      fields[key][rng.integers(len(fields[key]))] = some(rng, fields[key])
    elif what == 2:
      name = ("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window",
              "attention.key_length", "expert_count", "rope.dimension_count")  # fmt: skip
      fields[f"{arch}.{some(rng, name)}"] = one(rng, GGUF_VALUES)
    else:
      fields[key] = one(rng, GGUF_VALUES)
  alignment = fields.get("general.alignment", 64)
  fields["general.alignment"] = alignment if alignment in (32, 64) else 64  # the writer's own
  return write(arch, fields, *rest)


def numbers(rng, data: bytes, end: int) -> bytes:
  """A number of eight bytes somewhere in a header that is far too large."""
  at = int(rng.integers(max(1, end - 8)))
  value = int(some(rng, (2**63, 2**64 - 1, 2**31, 2**32 - 1, len(data), 2**20, 0)))
  return data[:at] + value.to_bytes(8, "little") + data[at + 8 :]


# ---- Something else under this name.


def others(corpus: list[bytes]) -> list[bytes]:
  """Whole files of other kinds, those that run code when they are unpickled among them."""
  from fuzz_corpus import npy

  bomb = np.empty(1, object)
  bomb[0] = Bomb()
  return [pickle.dumps(Bomb()), npy(bomb), b"", b"\n", b"null", b"[]", b"{}", b"\0" * 512,
          b"\xff\xfe{}", b"[" * 100_000, b"x" * 200_000, b"\n" * 5000, *corpus]  # fmt: skip


def place(rng, path, outside) -> str:
  """Puts what is no file under a name; returns what it is."""
  what = some(rng, ("directory", "dangling", "fifo", "outside", "missing", "loop"))
  path.unlink()
  if what == "directory":
    path.mkdir()
  elif what == "dangling":
    path.symlink_to(path.parent / "nothing")
  elif what == "fifo":
    os.mkfifo(path)
  elif what == "outside":
    path.symlink_to(outside)
  elif what == "loop":
    path.symlink_to(path)
  return what
