"""Files read as the library reads them, and what must be true of what it reads.

A reader takes the directory of a case and a generator. It may raise ValueError, as the library
does; an AssertionError is a file that was read to something that it cannot be.
"""

import json
import os

import fuzz_corpus
import jax
import numpy as np
import tiny

from rope_jax import config, factors, html, presets, report, resolve, results
from rope_jax.data import tokenizer
from rope_jax.data.tokens import TokenStore
from rope_jax.search.journal import Journal
from rope_jax.train import state
from rope_jax.weights import summary
from rope_jax.weights.source import open_source

TEXTS = ("a b  abc\n", "\U0001f600 é 12 <s>", "", "x" * 300)


class OfTheConfig(Exception):
  """A ValueError that names a key of the config, where it need not name a file."""


def checkpoint(directory, rng):
  """A Hugging Face directory, or the .gguf file that is in it."""
  path = str(next(iter(directory.glob("*.gguf")), directory))
  source = open_source(path)
  for name in sorted(source.names()):
    shape = source.shape(name)
    assert source.read(name).shape == shape, name
    part = tuple(slice(0, 1) for _ in shape)
    assert source.read(name, part).shape == tuple(min(1, n) for n in shape), name
  described = summary.describe(path)
  json.dumps(described)
  summary.text(described).encode()
  c = presets.pretrained(path, extend=bool(rng.integers(2)))
  with of_the_config():
    r = resolve.rope(c)
    assert np.isfinite(r.inv_freq).all() and r.inv_freq.shape[-1] <= source.rope.head_dim
  if rng.random() < 0.1:
    c.init_from = path
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
      given = state.initial_variables(c, mesh, "")["params"]
    assert given["embedding"].shape == (c.model.vocab_size, c.model.d_model)
  if os.path.lexists(directory / "tokenizer.json") or path.endswith(".gguf"):
    text(tokenizer.load("", path))


def tokens(directory, rng):
  path = directory / "tokenizer.json" if rng.random() < 0.5 else directory
  text(tokenizer.load(str(path)))


def text(t):
  """That a tokenizer does what the data need of it."""
  assert t.fingerprint and t.vocab_size >= 0 and isinstance(t.adds_bos, bool)
  for special in (t.bos_id, t.eos_id):
    assert special is None or 0 <= special < t.vocab_size
  for given in TEXTS:
    ids = t.encode(given)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not ids.size or ids.min() >= 0 and ids.max() < t.vocab_size
    assert isinstance(t.decode(ids), str)


def factor_lists(directory, rng):
  path = next(map(str, directory.iterdir()), str(directory / "factors.json"))
  found = factors.read(path)
  for key in ("long_factor", "short_factor"):
    assert np.isfinite(np.asarray(found.get(key, (1.0,)), np.float64)).all()
  assert type(found.get("start_tokens", 0)) is int
  c = config.base()
  c.model.update(num_layers=2, head_dim=16)
  c.rope.update(context=128, original_context=32, scaling="longrope")
  c.rope.longrope.factors = path
  with of_the_config():
    r = resolve.rope(c)
    assert np.isfinite(r.inv_freq).all() and r.inv_freq.shape[-1] == 8


def run(directory, rng):
  good = fuzz_corpus.run_config()
  found = config.read(str(directory))
  types(config.base(), found)
  results.facts(str(directory))
  config.check_workdir(good, str(directory), text="stdlib 3", factors_read="0123")


def types(base, found):
  """That each value is of the type that its key has."""
  for key in base:
    if isinstance(base[key], config.ConfigDict):
      assert isinstance(found[key], config.ConfigDict), key
      types(base[key], found[key])
    elif base[key] is not None:
      assert type(found[key]) is type(base[key]), (key, found[key])


def journal(directory, rng):
  """Whatever becomes of a journal, the lines that were whole are in it as they were."""
  file = directory / "search.jsonl"
  before = file.read_bytes() if file.is_file() else b""
  whole = before[: before.rfind(b"\n") + 1]
  try:
    found = Journal(str(file), fuzz_corpus.SETTINGS)
    for question, answer in zip(fuzz_corpus.questions(), fuzz_corpus.ANSWERS):
      given = found.ask(question, lambda answer=answer: list(answer))
      assert len(given) == len(answer)
      assert all(isinstance(x, float) or type(x) is int for x in given), given
  finally:
    after = file.read_bytes() if file.is_file() else b""
    assert after.startswith(whole), "lines are lost"
    began = json.dumps(fuzz_corpus.SETTINGS).encode()
    assert whole or after == before or began.startswith(before), "a file is lost"


def result_tables(directory, rng):
  found, about = results.read([str(directory)])
  report.table(found).encode()
  json.dumps(about)
  html.page(found, about).encode()


def token_store(directory, rng):
  store = TokenStore(str(directory), vocab_size=256)
  assert len(store) == len(store.lengths)
  for i in range(len(store)):
    ids = store[i]
    assert len(ids) == store.lengths[i] and ids.dtype == np.int32
    assert not ids.size or ids.min() >= 0 and ids.max() < 256
    assert len(store.slice(i, 0, 2)) == min(2, len(ids))


class of_the_config:
  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if isinstance(error, ValueError) and "config." in str(error):
      raise OfTheConfig(str(error)) from error
