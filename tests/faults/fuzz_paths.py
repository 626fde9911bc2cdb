"""Hostile values of settings that are paths."""

import contextlib
import os
import socket
import sys
from collections import Counter

import tiny
from conftest import ROOT
from fuzz_watch_texts import one_line, snapshot

from rope_jax import config, evals, validate
from rope_jax.data import corpus, tokens
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.export import files
from rope_jax.train import loop

VALUES = (
  "", ".", "..", "../..", "-x", "--help", "~", "~/x", "~nobody/x", "a\nb", "a\0b", "x" * 300,
  "y/" * 2500, "y/" * 1900, "a/" + "z" * 256, "{root}/file", "{root}/file/x",
  "{root}/file/../file", "{root}/folder", "{root}/folder/../folder", "{root}/empty",
  "{root}/loop", "{root}/loop/x", "{root}/dangling", "{root}/dangling/x", "{root}/fifo",
  "{root}/socket", "{root}/zero", "/dev/zero", "/dev/full", "/dev/null", "/dev/stdin",
  "/dev/fd/0", "/proc/self/mem", "/proc/kmsg", "/dev/zero/x", "gs://bucket/x", "s3://bucket/x",
  "file:///etc/hostname", "http://127.0.0.1:9/x", "$(touch executed)", "`touch executed`",
  ";touch executed", "%s%n{{prompt}}", "a,b", ",", "[", "**", "*", "{root}/*", "{root}/none*",
  "tfds:", "tfds:../x", "tfds:kaggle:x", "tfds:huggingface:x", "tfds:no_such_corpus",
  "tfds:pg19:9.9.9", "tfds:pg19/x=1", "tfds:no_such_corpus/train", "split:../x", "\udcff",
  "\ud800", "\u202e", "con", "a" * 255,
)  # fmt: skip
KEYS = ("workdir", "out", "data.source", "data.dir", "init_from", "tokenizer", "factors", "files",
        "haystack", "words")  # fmt: skip
# What readable files hold is not for here: tests/faults files is about that.
_NO_TEXT = ("tokenizer", "factors", "init_from")
_READABLE = ("{root}/file", "{root}/file/../file", "/proc/self/mem", "/proc/kmsg")


def one(rng, root: str, figures: Counter) -> None:
  """A value of each setting."""
  make(root)
  before = snapshot(root)
  for key in KEYS:
    value = VALUES[rng.integers(len(VALUES))]
    try_out(key, value, root, figures)
    for made in ("data", "made"):
      os.makedirs(made, exist_ok=True)
  assert not os.path.exists("executed")
  after = snapshot(root)
  assert {p: after.get(p) for p in before} == before  # nothing is lost


def try_out(key: str, value: str, root: str, figures: Counter) -> None:
  """One value of one setting: used, or refused in a line that names the setting."""
  if key in _NO_TEXT and value in _READABLE or (key, value) == ("factors", ""):
    return
  value = value.replace("{root}", root)
  figures["paths"] += 1
  try:
    with contextlib.redirect_stdout(None):
      _use(key, value, root)
  except ValueError as error:
    # A split is one of the source, which may be what has none of that name.
    if "\n" in value:  # launch/cli.py prints it as a line
      error = ValueError(str(error).replace(value, repr(value)))
    of_split = (key, value) == ("files", "") or value.startswith("split:")
    of_split &= key in ("files", "haystack")
    one_line(error, "config.data.source" if of_split else _NAMES.get(key, f"config.{key}"))
    figures["refused"] += 1
  else:
    figures["used"] += 1


_NAMES = dict(
  workdir="--workdir=",
  out="--out=",
  factors="config.rope.longrope.factors",
  files="config.evals.e",
  haystack="config.evals.e",
  words="config.evals.e",
)


def make(root: str) -> None:
  """What the values name."""
  for folder in ("folder", "empty", "data", "made"):
    os.mkdir(folder)
  for path in ("file", "folder/a", "folder/b", "sentinel"):
    with open(path, "w") as f:
      f.write("some text that is long enough for a piece of it " * 40)
  os.symlink(os.path.join(root, "loop"), "loop")
  os.symlink("/nowhere/at/all", "dangling")
  os.symlink("/dev/zero", "zero")
  os.mkfifo("fifo")
  with contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
    s.bind("socket")


def _use(key: str, value: str, root: str) -> None:
  """What a run does with a setting, as far as it matters."""
  c = tiny.run_config(os.path.join(root, "folder"))
  c.data.dir = os.path.join(root, "data")
  del c.evals.perplexity
  if key in ("workdir", "out"):
    _directory(c, key, value)
    return
  if key == "factors":
    c.rope.update(scaling="longrope", context=128)
    c.rope.longrope.factors = value
  elif key in ("files", "haystack", "words"):
    c.rope.update(context=4096, original_context=4096)
    if key == "files":
      c.evals.e = config.perplexity(lengths=(32,), stride=16, num_samples=1, files=value)
    else:
      options = dict(tasks=("niah_single_2",), num_samples=1, lengths=(4096,))
      c.evals.e = config.ruler(**options, **{key: value})
  else:
    block, _, leaf = key.rpartition(".")
    (c[block] if block else c)[leaf] = value
  validate.validate(c)
  if key.startswith("data."):
    directory = config.data_dir(c)
    if key == "data.dir" and not os.path.abspath(directory).startswith(root):
      return  # it can be used, but is not ours
    documents = corpus.documents(c.data.source, "train", directory)
    assert len(tokens.tokenize(documents, ByteTokenizer(), directory, append_eos=False))
  elif key == "tokenizer":
    loop.load_tokenizer(c, "")
  else:
    evals.check(c, ByteTokenizer())


def _directory(c, flag: str, value: str) -> None:
  """As launch/*.py check it, and then with the text of the error as ValueError."""
  if str(ROOT / "launch") not in sys.path:
    sys.path.append(str(ROOT / "launch"))
  import cli

  said = []
  fail, cli.fail = cli.fail, lambda error: said.append(str(error)) or sys.exit(2)
  try:
    cli.check_directory(flag, value)
  except SystemExit:
    raise ValueError(said[0]) from None
  finally:
    cli.fail = fail
  if not os.path.abspath(value or "runs").startswith(os.path.join(os.getcwd(), "")):
    return
  if flag == "workdir":
    value = value or os.path.join("made", "run")
    config.write(c, value)
    assert config.holds_run(value)
    os.remove(os.path.join(value, "run.json"))
  elif value:
    with files.new_directory(value) as directory:
      assert os.path.isdir(directory)
