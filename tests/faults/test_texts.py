"""Odd text and hostile paths, briefly; `python tests/faults texts` does it at length."""

import os
import signal
import subprocess
import sys
import time

import alone
import fuzz_texts
import numpy as np
import pytest
from conftest import ROOT
from fuzz_watch_texts import watched

from rope_jax import config, evals, paths
from rope_jax.data import corpus, tokenizer, tokens
from rope_jax.data.text_builder import read_text
from rope_jax.data.tokenizer import ByteTokenizer


def prepared(folder, data, split="train"):
  return corpus.documents(str(folder), split, str(data))


def texts(folder, data):
  documents = prepared(folder, data)
  return [documents[i] for i in range(len(documents))]


def tokenized(folder, data):
  return tokens.tokenize(prepared(folder, data), ByteTokenizer(), str(data), append_eos=False)


def write(folder, name="a.txt", text="some text"):
  folder.mkdir(exist_ok=True, parents=True)
  (folder / name).write_text(text)
  return folder


def test_odd_texts_and_hostile_paths_are_used_or_refused():
  figures = alone.run("texts", count=36)
  assert figures["corpora"] == 24 and figures["paths"] > 100
  assert figures["used"] > 50 and figures["refused"] > 100 and figures["tokens"] > 10**5


def test_the_watch_sees_what_it_is_for():
  with pytest.raises(AssertionError, match="subprocess.Popen"), watched():
    subprocess.run(["true"])


def test_a_corpus_of_empty_files_is_refused(tmp_path):
  write(tmp_path / "text", text=" \n\t")
  with pytest.raises(ValueError, match="config.data.source=.* all of its files are empty"):
    prepared(tmp_path / "text", tmp_path / "data")


def test_links_in_a_loop_give_each_document_once(tmp_path):
  folder = write(tmp_path / "text")
  for name in ("x", "y", "z"):
    (folder / name).symlink_to(".")
  for source in (folder, folder / "**"):
    assert texts(source, tmp_path / "data") == ["some text"]


def test_names_of_any_bytes_are_different_documents(tmp_path):
  folder = write(tmp_path / "text", "m\\n", "backslash")
  write(folder / "m", "n", "slash")
  with open(os.path.join(os.fsencode(folder), b"\xff"), "w") as f:
    f.write("no UTF-8")
  found = texts(folder, tmp_path / "data")
  assert sorted(found) == ["backslash", "no UTF-8", "slash"]


def test_a_path_that_is_there_is_no_glob(tmp_path):
  write(tmp_path / "text", "[a]*?.txt", "with brackets")
  write(tmp_path / "text", "a.txt", "without")
  assert texts(tmp_path / "text" / "[a]*?.txt", tmp_path / "data") == ["with brackets"]
  assert paths.files(str(tmp_path / "text" / "[a].txt")) == [str(tmp_path / "text" / "a.txt")]


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full", "/proc/self/mem", "/proc/kmsg", "fifo"])
def test_what_is_no_plain_file_is_not_read(tmp_path, path):
  if path == "fifo":
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
  with pytest.raises(ValueError, match="config.data.source="):
    prepared(path, tmp_path / "data")
  c = config.base()
  c.evals.e = config.perplexity(files=path, lengths=(8,), num_samples=1)
  with pytest.raises(ValueError, match="config.evals.e: "):
    evals.check(c, ByteTokenizer())


def test_a_reader_opens_nothing_that_may_have_no_end(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for path in (tmp_path / "fifo", "/dev/zero", tmp_path):
    with pytest.raises(ValueError, match="is not a regular file"):
      read_text(str(path))
  assert os.path.getsize("/proc/self/status") == 0
  assert read_text("/proc/self/status") == ""  # others of its kind wait for what is to come


def test_a_file_that_is_too_large_is_refused(tmp_path):
  with open(write(tmp_path / "text") / "a.txt", "r+b") as f:
    f.truncate(2**30)  # a hole: it takes no room
  with pytest.raises(ValueError, match="config.data.source=.*1,073,741,824 bytes"):
    prepared(tmp_path / "text", tmp_path / "data")


@pytest.mark.parametrize("what", ["changed", "removed", "emptied"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, what, monkeypatch):
  folder = write(tmp_path / "text")
  write(folder, "b.txt", "other")
  change = dict(
    changed=lambda: (folder / "b.txt").write_text("another text"),
    removed=lambda: (folder / "b.txt").unlink(),
    emptied=lambda: (folder / "b.txt").write_text(""),
  )[what]
  fuzz_texts.change_while_read(monkeypatch, change, after=4)
  with pytest.raises(ValueError, match="config.data.source=.*(changed|No such file)"):
    prepared(folder, tmp_path / "data")
  monkeypatch.undo()
  assert len(texts(folder, tmp_path / "data")) == 2 - (what != "changed")


@pytest.mark.parametrize("name", ["huggingface:glue", "kaggle:x", "x/data_dir=/", ""])
def test_corpora_whose_code_would_be_downloaded_are_refused(tmp_path, name):
  with watched(), pytest.raises(ValueError, match="config.data.source='tfds:.*the catalogue"):
    prepared(f"tfds:{name}", tmp_path)


def test_an_unknown_corpus_is_an_error_of_one_line(tmp_path):
  for name in ("tfds:no_such_corpus", "tfds:pg19:9.9.9", "tfds:pg19/no_such_config"):
    with watched(), pytest.raises(ValueError, match=r"\Aconfig.data.source='tfds:.*\Z"):
      prepared(name, tmp_path)


def test_what_a_killed_process_leaves_behind_is_not_read(tmp_path):
  folder, data = write(tmp_path / "text"), tmp_path / "data"
  expected = texts(folder, data)
  tokenized(folder, data)
  [corpus_dir], [cache] = (data / "rope_jax_text").glob("*/1.0.0"), (data / "tokens").iterdir()
  # As TFDS and tokenize name what they are not done with; half of it is there.
  partial = corpus_dir.rename(corpus_dir.with_name("incomplete.AB12CD_1.0.0"))
  for file in partial.glob("*.array_record*"):
    file.write_bytes(file.read_bytes()[:10])
  (partial / "dataset_info.json").unlink()
  cache.rename(cache.with_name("tmpabcd"))
  (cache.with_name("tmpabcd") / "offsets.npy").unlink()
  assert texts(folder, data) == expected
  assert tokenized(folder, data)[0].tolist() == list(b"some text")


def test_a_process_killed_while_it_prepares_is_made_good(tmp_path):
  folder, data = write(tmp_path / "text"), tmp_path / "data"
  for i in range(1200):
    (folder / f"{i}").write_text(f"text {i} " * 20)
  code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests/faults")!r}]
from pathlib import Path; import test_texts
test_texts.tokenized(Path({str(folder)!r}), Path({str(data)!r}))"""
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
  while process.poll() is None and not list(data.glob("rope_jax_text/*/*incomplete*/*")):
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL and not list(data.glob("rope_jax_text/*/1.0.0"))
  store, documents = tokenized(folder, data), prepared(folder, data)
  assert len(store) == len(documents) > 1000
  assert all(bytes(store[i].tolist()).decode() == documents[i] for i in range(len(store)))


@pytest.mark.parametrize("file, damage", [
  ("tokens.bin", lambda data: data[:-4]),
  ("tokens.bin", lambda data: data + b"1234"),
  ("offsets.npy", lambda data: data[:-3]),
  ("offsets.npy", lambda data: b""),
  ("tokens.bin", None),
])  # fmt: skip
def test_a_cut_token_cache_is_refused(tmp_path, file, damage):
  folder, data = write(tmp_path / "text"), tmp_path / "data"
  tokenized(folder, data)
  [cache] = (data / "tokens").iterdir()
  if damage:
    (cache / file).write_bytes(damage((cache / file).read_bytes()))
  else:
    (cache / file).unlink()
  with pytest.raises(ValueError, match="config.data.dir: .*the token cache is damaged"):
    tokenized(folder, data)


def test_a_cache_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
  folder, data = write(tmp_path / "text"), tmp_path / "data"

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "save", full)
  with pytest.raises(ValueError, match="config.data.dir=.*No space left"):
    tokenized(folder, data)
  assert not list((data / "tokens").iterdir())


def test_text_that_no_tokenizer_takes_names_the_source(tmp_path):
  documents = type("Documents", (list,), dict(fingerprint="x"))(["good", "half \ud800"])
  with pytest.raises(ValueError, match="config.data.source: document 1: .*surrogates"):
    tokens.tokenize(documents, ByteTokenizer(), str(tmp_path), append_eos=False)


def test_one_line_of_a_megabyte_is_a_document(tmp_path):
  # More than the most characters of a piece.
  line = "".join(np.random.default_rng(0).choice(list("abc1,"), 1_100_000))
  folder = write(tmp_path / "text", text=line)
  documents = prepared(folder, tmp_path / "data")
  for t in (ByteTokenizer(), tokenizer.load("", "smollm2-135m")):
    store = tokens.tokenize(documents, t, str(tmp_path / "data"), append_eos=False)
    assert t.decode(store[0]) == line


@pytest.mark.parametrize("script, arguments, message", [
  ("generate", ["--prompt_file=/dev/zero"], "--prompt_file='/dev/zero': "),
  ("convert", ["--workdir=http://x/y", "--out=z"], "--workdir='http://x/y': it is a URL"),
])  # fmt: skip
def test_commands_refuse_hostile_paths_in_a_line(script, arguments, message):
  first = "export" if script == "convert" else "--config=configs/quickstart.py"
  command = [sys.executable, f"launch/{script}.py", first, *arguments]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
  )
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
