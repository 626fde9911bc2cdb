"""Odd texts and hostile paths: all of the text is there in order, or a line says what is wrong.

  python tests/faults texts --count=300 --seed=0

Number N of a seed is always the same. A third of them are values of settings that are paths
(fuzz_paths.py). Nothing may hang, run, connect, or write outside of the directory for data.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
from collections import Counter

import fuzz_paths
import numpy as np
from fuzz_watch_texts import one_line, snapshot, watched

from rope_jax import config, evals
from rope_jax.data import corpus, text_builder, tokens
from rope_jax.data.batches import Batches
from rope_jax.data.tokenizer import ByteTokenizer

HANG = 120  # seconds, generous
NAMES = (
  b"a.txt", b"b c.txt", b"d\ne.txt", b"f'g\"h", b"*", b"[x]", b"?", b"-rf", b"~", b"..x",
  b"\xff\xfe",
  b"y" * 255, b"$(touch executed)", b"`touch executed`", b"m\\n", b"m/n", b"p/q/r/s/t/u/v/w", b"#",
  b"%s{prompt}", b"\xe2\x80\xae.txt", b".hidden", b".hidden-folder/z", b"1.0.0", b"train", b";",
)  # fmt: skip


class EndingTokenizer(ByteTokenizer):
  """Bytes with BOS and EOS of its own."""

  vocab_size, bos_id, eos_id, adds_bos, fingerprint = 258, 256, 257, True, "ending"


def run(seed: int, count: int) -> dict:
  """Tries `count` corpora and paths.

  Returns:
    corpora, paths: of each how many; used, refused: corpora, batches, evaluations and paths that
    were right, and that were refused with a line; tokens: how many were compared.
  """
  figures = Counter(corpora=0, paths=0, used=0, refused=0, tokens=0)
  for number in range(count):
    try_number(seed, number, figures)
  return dict(figures)


def try_number(seed: int, number: int, figures: Counter) -> None:
  """A corpus, or of every third number paths, in a directory of its own."""
  rng, part = np.random.default_rng([seed, number]), fuzz_paths.one if number % 3 == 2 else one
  with tempfile.TemporaryDirectory(prefix="texts-") as outer:
    root = os.path.join(os.path.realpath(outer), "deep", "er")  # '../..' is ours, too
    os.makedirs(root)
    with _limited(f"seed {seed}, number {number}"), contextlib.chdir(root), watched():
      part(rng, root, figures)


def one(rng, root: str, figures: Counter) -> None:
  """A corpus, through batches and through the text of an evaluation."""
  folder, data = os.path.join(root, "text"), os.path.join(root, "data")
  expected = make(rng, folder)
  before = snapshot(root)
  found = {}
  source = folder if rng.integers(4) else os.path.join(folder, "**")
  for split in ("train", "validation"):
    documents = refusal(
      lambda split=split: corpus.documents(source, split, data), "config.data.source", figures
    )
    if documents is None:
      continue
    found[split] = [documents[i] for i in range(len(documents))]
    _batches(rng, documents, found[split], data, figures)
  assert sorted(sum(found.values(), [])) == sorted(expected), source
  evaluation(rng, folder, data, expected, figures)
  shutil.rmtree(data, ignore_errors=True)
  assert snapshot(root) == before
  figures["corpora"] += 1


def refusal(function, key: str, figures: Counter):
  """What it returns, or None where it refuses with a line that names the key."""
  try:
    with contextlib.redirect_stdout(None):
      found = function()
  except ValueError as error:
    one_line(error, key)
    figures["refused"] += 1
    return None
  figures["used"] += 1
  return found


def make(rng, folder: str) -> list[str]:
  """Fills a folder; returns the texts that are to be found in it."""
  os.makedirs(folder)
  expected, many = {}, rng.integers(30) == 0
  names = [f"{i:04}".encode() for i in range(2000)] if many else NAMES
  for name in rng.permutation(len(names))[: 2000 if many else rng.integers(1, 8)]:
    name = names[name]
    path = os.path.join(os.fsencode(folder), name)
    try:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      data = b"%d " % rng.integers(100) if many else content(rng)
      with open(path, "wb") as f:
        f.write(data)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):  # there already, otherwise
      continue
    text = re.sub("\r\n?", "\n", data.decode("utf-8", errors="replace"))
    hidden = any(part.startswith(b".") for part in name.split(b"/"))
    if text.strip() and not hidden:
      expected[name] = text
  for kind in rng.permutation(6)[: rng.integers(4)]:
    with contextlib.suppress(FileExistsError):
      hostile(int(kind), folder)
  return list(expected.values())


def content(rng) -> bytes:
  """Bytes of a file."""
  n = int(10 ** rng.uniform(0, 4))
  kinds = (
    b"",
    b" \t\r\n\x0b\x0c" * n,
    "\u2028\u3000\x85".encode() * n,
    b"\0" * n,
    bytes(rng.integers(0, 256, n, dtype=np.uint8)),
    bytes(rng.integers(128, 256, n, dtype=np.uint8)),
    ("wide " * n).encode("utf-16"),
    ("wide " * n).encode("utf-32"),
    b"\xef\xbb\xbfmarked " * n,
    b"\xed\xa0\x80 half a pair \\ud800" * n,
    b"line\r\nline\rline\n" * n,
    b"x" * n,
    "e\u0301\U0001f600\u202e".encode() * n,
    b"\xf0\x9f\x98",  # the start of a character, and the end of the file
    b"x" * (2 * 2**20) if rng.integers(20) == 0 else b"y" * n,
    b"__import__('os').system('touch executed')\n" * 9,
  )
  return kinds[rng.integers(len(kinds))]


def hostile(kind: int, folder: str) -> None:
  """What is no file: it is left out."""
  path = os.path.join(folder, f"odd{kind}")
  if kind == 0:
    os.mkfifo(path)
  elif kind == 1:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as s, contextlib.chdir(folder):
      s.bind(os.path.basename(path))
  elif kind == 2:
    os.symlink("/nowhere/at/all", path)
  elif kind == 3:
    os.symlink(path, path)
  elif kind == 4:
    os.symlink("/dev/zero", path)
  else:  # two loops: a walk that follows them goes on for longer than anybody waits
    os.symlink(folder, path)
    os.symlink(".", path + "-")


def _batches(rng, documents, texts: list[str], data: str, figures: Counter) -> None:
  tokenizer = EndingTokenizer() if rng.integers(2) else ByteTokenizer()
  ends = bool(rng.integers(2))
  store = tokens.tokenize(documents, tokenizer, data, append_eos=ends)
  wanted = []
  for text in texts:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    if tokenizer.adds_bos:
      ids = np.concatenate([[256], ids, [257]] if ends else [[256], ids])
    wanted.append(ids)
  for i, ids in enumerate(wanted):
    np.testing.assert_array_equal(store[i], ids)
    figures["tokens"] += len(ids)
  for packing in ("pack", "document"):
    length, least = int(10 ** rng.uniform(0, 4.5)), int(rng.choice([0, 0, 3, 100, 10**7]))
    size = int(rng.integers(1, 4))
    options = dict(length=length, batch_size=size, packing=packing, min_tokens=least, seed=3)
    batches = refusal(lambda options=options: Batches(store, **options), "config.data.", figures)
    if batches:
      _check(batches, wanted, max(least, 2), packing, length, figures)


def _check(batches, wanted, least: int, packing: str, length: int, figures: Counter) -> None:
  """An epoch, or the first thousand rows of it, against a list of (token, document)."""
  order, _ = batches._epoch(0)
  assert sorted(order) == [i for i, ids in enumerate(wanted) if len(ids) >= least]
  rows = min(batches.per_epoch, 1000, 1 + 10**6 // length)
  made = [batches(step) for step in range(-(-rows // batches.batch_size))]
  made = {key: np.concatenate([b[key] for b in made])[:rows] for key in made[0]}
  if packing == "pack":
    stream = np.concatenate([wanted[i] for i in order])
    owner = np.repeat(np.arange(len(order)), [len(wanted[i]) for i in order])
    assert batches.per_epoch == (len(stream) - 1) // length
  for row in range(rows):
    if packing == "pack":
      ids, own = (x[row * length : (row + 1) * length + 1] for x in (stream, owner))
    else:
      ids = wanted[order[row]][: length + 1]
      own, padding = np.zeros(len(ids), int), length + 1 - len(ids)
      ids, own = np.pad(ids, (0, padding)), np.pad(own, (0, padding), constant_values=-1)
    got = {key: x[row] for key, x in made.items()}
    np.testing.assert_array_equal(got["tokens"], ids[:-1])
    np.testing.assert_array_equal(got["targets"], ids[1:])
    np.testing.assert_array_equal(got["weights"], (own[:-1] == own[1:]) & (own[1:] >= 0))
    np.testing.assert_array_equal(np.diff(got["segment_ids"]) != 0, np.diff(own[:-1]) != 0)
    first = np.flatnonzero(np.diff(own[:-1], prepend=-2))
    place = np.arange(length) - np.repeat(first, np.diff(first, append=length))
    np.testing.assert_array_equal(got["positions"], np.where(own[:-1] < 0, 0, place))
    figures["tokens"] += length


def evaluation(rng, folder: str, data: str, expected: list[str], figures: Counter) -> None:
  """Pieces of text for an evaluation: each is a part of a text, or the evaluation is refused."""
  c = config.base()
  c.data.source, c.data.dir, c.tokenizer = folder, data, "byte"
  inside = sorted(os.listdir(folder))
  files = ["", "split:train", "split:nothing", f"{folder}/*", f"{folder}/**", f"{folder}/no*"]
  files += [os.path.join(folder, inside[rng.integers(len(inside))]), "/dev/zero", f"{folder}/odd0"]
  n = int(10 ** rng.uniform(0.4, 3))
  c.evals.e = config.perplexity(files=str(rng.choice(files)), num_samples=3, lengths=(n,))
  with evals._named("e"), contextlib.redirect_stdout(None):
    subject = evals.Subject(c, ByteTokenizer(), None)
    found = refusal(lambda: evals.module("perplexity")._samples(c.evals.e, subject), "", figures)
  whole = [text.encode() for text in expected]
  hidden = any(name.startswith(".") for name in inside)
  for ids in found or []:
    piece = ids.astype(np.uint8).tobytes()
    assert len(piece) == n
    assert (
      hidden or any(piece in text for text in whole) or not piece.decode(errors="ignore").strip()
    )


@contextlib.contextmanager
def _limited(what: str):
  """Fails where something hangs."""

  def late(*_):
    raise TimeoutError(f"{what}: more than {HANG} s")

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(HANG)
  try:
    yield
  except BaseException as error:
    error.add_note(what)
    raise
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def change_while_read(monkeypatch, change, after: int) -> None:
  """Calls `change` after so many reads of files."""
  read, times = text_builder.read_text, Counter()

  def reading(path):
    times["read"] += 1
    if times["read"] == after:
      change()
    return read(path)

  monkeypatch.setattr(text_builder, "read_text", reading)
