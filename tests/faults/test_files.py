"""Files that are not what they should be, of every kind that is read, from whoever wrote them."""

import json
import os
import pickle

import alone
import fuzz_corpus
import fuzz_files
import fuzz_mutations
import fuzz_watch
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from rope_jax import config, factors, presets, reading, results
from rope_jax.data import tokenizer
from rope_jax.data.tokens import TokenStore
from rope_jax.search.journal import Journal
from rope_jax.weights.source import open_source


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
  return fuzz_files.Fuzz(tmp_path_factory.mktemp("files"), seed=0)


def test_damaged_files_are_refused_by_name_or_read_and_nothing_of_them_runs():
  found = alone.run("files", count=300)
  assert found["files"] == found["refused"] + found["read"] == 300
  for kind, of_kind in found["by_kind"].items():
    assert of_kind["refused"], kind
  assert found["read"] > 30  # not all of the damage is beyond reading
  assert found["executed"] == found["hung"] == 0


@pytest.fixture
def no_traps(monkeypatch, tmp_path):
  """Where a payload would leave its mark."""
  monkeypatch.chdir(tmp_path)
  yield
  assert not (tmp_path / fuzz_mutations.BOMB).exists()


NAMES = [(kind, name) for kind, names in dict(
  hugging_face=("config.json", "model.safetensors.index.json", "tokenizer.json",
                "tokenizer_config.json", "model-00001-of-00002.safetensors"),
  gguf=("model.gguf",), tokenizer=("tokenizer.json", "tokenizer_config.json"),
  factors=("factors.json",), run=("run.json", "rope.json"), journal=("search.jsonl",),
  results=("results.json",), tokens=("offsets.npy", "tokens.bin"),
).items() for name in names]  # fmt: skip


@pytest.mark.parametrize("kind, name", NAMES)
@pytest.mark.parametrize("what", ["fifo", "directory", "loop"])
def test_what_is_no_file_is_refused_at_once(fuzz, kind, name, what):
  """To open a named pipe that nobody writes to would wait for ever."""
  fuzz.write(fuzz.good[kind][0])
  path = fuzz.case / name
  path.unlink()
  dict(fifo=os.mkfifo, directory=os.mkdir, loop=lambda p: os.symlink(p, p))[what](path)
  assert fuzz.read(kind, np.random.default_rng(2)) == ("refused", "")


def test_the_watch_sees_what_must_not_be(tmp_path):
  """The fuzzing is worth what this is: code that runs, files elsewhere, and hangs are seen."""
  (tmp_path / "a.npy").write_bytes(fuzz_corpus.npy(np.array([None])))
  with fuzz_watch.watch(str(tmp_path / "case")) as seen:
    np.load(tmp_path / "a.npy", allow_pickle=True)
    (tmp_path / "elsewhere").write_text("")
  assert any("pickle.find_class" in x for x in seen), seen
  assert any("elsewhere" in x for x in seen), seen


@pytest.mark.parametrize("text, what", [
  ('{"a": 1, "a": 2}', "'a' is there twice"),
  ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
  ("[" * 100_000, "nested too deeply"),
  ('{"a": "\\ud800"}', "surrogate"),
  ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
  ("[]", "expected an object"),
  ("", "Expecting value"),
], ids=range(7))  # fmt: skip
def test_json_that_readers_take_differently_is_refused(tmp_path, text, what):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=f"{tmp_path}/config.json: .*{what}"):
    reading.read_object(str(tmp_path / "config.json"))


def test_an_error_is_one_printable_line_whatever_it_quotes(fuzz):
  good = fuzz.good["hugging_face"][0]
  for value in ("x" * 10**6, "a\nb\x1b[2J\u2028", [0] * 10**5):
    hf = json.loads(good["config.json"]) | dict(hidden_act=value)
    fuzz.write(good | {"config.json": json.dumps(hf).encode()})
    with pytest.raises(ValueError, match="hidden_act") as error:
      presets.pretrained(str(fuzz.case))
    assert fuzz_files.complaint(str(error.value), str(fuzz.case)) is None


@pytest.mark.parametrize("key", ["head_dim", "hidden_size"])
def test_a_size_that_no_model_has_does_not_become_an_array(fuzz, key):
  good, before = fuzz.good["hugging_face"][0], fuzz_watch.peak_mb()
  hf = json.loads(good["config.json"]) | {key: 2**24}
  fuzz.write(good | {"config.json": json.dumps(hf).encode()})
  with pytest.raises(ValueError, match="head_dim must be.*at most 65,536"):
    presets.pretrained(str(fuzz.case))
  assert fuzz_watch.peak_mb() - before < 500


def test_heads_of_the_model_and_of_its_rope_are_one_size(fuzz):
  """Qwen3 has heads of 128 where its config.json does not say, whatever its width."""
  good = fuzz.good["hugging_face"][1]
  hf = {k: v for k, v in json.loads(good["config.json"]).items() if k != "head_dim"}
  fuzz.write(good | {"config.json": json.dumps(hf).encode()})
  source = open_source(str(fuzz.case))
  assert source.rope.head_dim == source.hyperparameters["head_dim"] == 128


# ---- Tokenizers.


def test_a_broken_tokenizer_is_named(tmp_path):
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
  with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json: no tokenizer that can be read"):
    tokenizer.load(str(tmp_path))


def test_ids_with_gaps_count_as_the_tokens_that_a_model_must_have(tmp_path):
  """An id beyond the embedding would be read as its last row, without a word."""
  file = tmp_path / "tokenizer.json"
  t = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 70}, unk_token="a"))
  t.save(str(file))
  assert tokenizer.load(str(tmp_path)).vocab_size == 71
  file.write_text(file.read_text().replace("70", "2147483653"))
  with pytest.raises(ValueError, match=f"{file}: a token has the id 2147483653"):
    tokenizer.load(str(tmp_path))


def test_a_tokenizer_that_fails_on_a_text_is_named(tmp_path):
  """The library finds out only then that the token for what is unknown is none."""
  t = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
  t.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json: .*UNK"):
    tokenizer.load(str(tmp_path)).encode("b")


def test_a_special_token_that_no_model_has_is_refused(tmp_path):
  t = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
  t.post_processor = tokenizers.processors.BertProcessing(("x", 1), ("y", 77))
  t.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json: the special token 77"):
    tokenizer.load(str(tmp_path))


def test_a_panic_of_the_library_is_an_error_that_names_the_file(tmp_path):
  """It gives up on a regular expression that would take for ever, and is no Exception then."""
  t = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
  t.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(x+x+)+y"), "isolated")
  t.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json: .*retry-limit"):
    tokenizer.load(str(tmp_path)).encode("x" * 300)


# ---- Token caches.


@pytest.fixture
def cache(tmp_path, fuzz):
  for name, data in fuzz.good["tokens"][0].items():
    (tmp_path / name).write_bytes(data)
  return tmp_path


def test_a_cut_token_cache_is_refused_wherever_it_is_cut(cache):
  for file in ("tokens.bin", "offsets.npy"):
    data = (cache / file).read_bytes()
    for end in range(0, len(data), 4 if file == "tokens.bin" else 1):
      (cache / file).write_bytes(data[:end])
      with pytest.raises(ValueError, match=f"{cache}/.*damaged.*delete {cache}"):
        TokenStore(str(cache))
    (cache / file).write_bytes(data)
  assert len(TokenStore(str(cache), 256)) == 6


@pytest.mark.parametrize("offsets", [
  [0, 3, 2, 132], [1, 132], [0, -4, 132], [0, 2**62, 132], [], 132, [[0, 132]], [0.0, 132.0],
  [0, 131], [0, 133],
], ids=str)  # fmt: skip
def test_offsets_that_cannot_be_are_refused(cache, offsets):
  assert (cache / "tokens.bin").stat().st_size == 132 * 4
  np.save(cache / "offsets.npy", np.array(offsets))
  with pytest.raises(ValueError, match="damaged"):
    TokenStore(str(cache))


def test_a_pickle_in_a_token_cache_does_not_run(cache, no_traps):
  payload = np.empty(1, object)
  payload[0] = fuzz_mutations.Bomb()
  for data in (fuzz_corpus.npy(payload), pickle.dumps(payload)):
    (cache / "offsets.npy").write_bytes(data)
    with pytest.raises(ValueError, match=f"{cache}/offsets.npy: .*damaged"):
      TokenStore(str(cache))


def test_a_token_that_is_none_is_found_when_it_is_read(cache):
  data = bytearray((cache / "tokens.bin").read_bytes())
  for wrong in (256, -1):
    data[8:12] = wrong.to_bytes(4, "little", signed=True)
    (cache / "tokens.bin").write_bytes(data)
    store = TokenStore(str(cache), 256)
    with pytest.raises(ValueError, match=f"{cache}/tokens.bin: .*token {wrong} is none of 256"):
      store[0]
    with pytest.raises(ValueError, match="damaged"):
      store.slice(0, 2, 3)
    assert len(store[4])


# ---- Files of runs and of searches.


@pytest.mark.parametrize("text, what", [
  ("[1, null]", "expected a number, got None"), ("[1, true]", "got True"), ("[]", "a list"),
  ("[1, NaN]", "got nan"), ("[1, 1e999]", "got inf"), ('[1, "2"]', "got '2'"),
  ("[[1, 2], [3]]", "in each row"), ("[1, [2]]", r"got \[2\]"), ("[[]]", "in each row"),
  ("[[[1]]]", r"got \[1\]"),
  ('{"long_factor": [1], "start_tokens": true}', "start_tokens"),
  ('{"long_factor": [1], "start_tokens": -1}', "start_tokens"),
])  # fmt: skip
def test_factors_are_finite_numbers_in_equal_rows(tmp_path, text, what):
  (tmp_path / "f.json").write_text(text)
  with pytest.raises(ValueError, match=f"{tmp_path}/f.json: no factors to read: .*{what}"):
    factors.read(str(tmp_path / "f.json"))


@pytest.mark.parametrize("text", ["1,nan", "1,2\n3", "1,inf", "1,x", '"', "1\0,2", "9" * 200_000])
def test_tables_of_factors_are_finite_numbers_in_equal_rows(tmp_path, text):
  (tmp_path / "f.csv").write_text(text)
  with pytest.raises(ValueError, match=f"{tmp_path}/f.csv: no factors to read: "):
    factors.read(str(tmp_path / "f.csv"))


@pytest.mark.parametrize("text", ["a letter to someone", '{"search.method": "gradi', "\0" * 9])
def test_a_file_that_is_no_journal_is_not_written_over(tmp_path, text):
  path = tmp_path / "search.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=f"{path}: line 1 is damaged"):
    Journal(str(path), fuzz_corpus.SETTINGS)
  assert path.read_text() == text


@pytest.mark.parametrize("answer", [None, [], [1.0, 2.0], ["x"], [True], [10**400], {"a": 1}])
def test_a_journal_whose_answers_are_no_numbers_is_refused(tmp_path, answer):
  path = tmp_path / "search.jsonl"
  line = dict(question=dict(fitness=[dict(factors=[1.0], start_tokens=0)]), answer=answer)
  path.write_text(json.dumps(fuzz_corpus.SETTINGS) + "\n" + json.dumps(line) + "\n")
  with pytest.raises(ValueError, match=f"{path}: line 2 is damaged"):
    Journal(str(path), fuzz_corpus.SETTINGS)


def test_a_journal_that_was_cut_off_anywhere_goes_on(tmp_path, fuzz):
  (data,) = fuzz.good["journal"][0].values()
  path = tmp_path / "search.jsonl"
  for end in range(0, len(data), 11):
    path.write_bytes(data[:end])
    journal = Journal(str(path), fuzz_corpus.SETTINGS)
    for question, answer in zip(fuzz_corpus.questions(), fuzz_corpus.ANSWERS):
      assert journal.ask(question, lambda answer=answer: answer) == answer
    assert path.read_bytes() == data


@pytest.mark.parametrize("change", [
  dict(seed=None), dict(seed=True), dict(seed="0"), dict(seed=[0]), dict(train=3), dict(rope=[]),
  dict(train=dict(b1=10**400)),
  dict(unknown=1), dict(evals=[]), dict(evals=dict(a=dict(type=[]))),
], ids=str)  # fmt: skip
def test_a_run_whose_settings_are_of_other_types_is_refused(tmp_path, change):
  config.write(fuzz_corpus.run_config(), str(tmp_path))
  file = tmp_path / "run.json"
  whole = json.loads(file.read_text())
  file.write_text(json.dumps(whole | dict(config=whole["config"] | change)))
  with pytest.raises(ValueError, match=f"{file}: "):
    config.read(str(tmp_path))


@pytest.mark.parametrize("change", [
  dict(stderr="x"), dict(ppl=None), dict(ppl=True), dict(ppl=10**400), dict(metric=[]),
  dict(by_position=3), dict(by_position=[3]), dict(low=1.0), dict(threshold={}),
  dict(tasks=dict(a=1)), dict(show="by_position", by_position=[dict(start=0, end=1)]),
], ids=str)  # fmt: skip
def test_results_that_could_not_be_shown_are_refused_when_they_are_read(tmp_path, change):
  good = dict(metric="ppl", ppl=float("nan"), stderr=0.5)
  for r, fits in ((good, True), (good | change, False)):
    (tmp_path / "results.json").write_text(json.dumps({"p": {"128": r}}))
    if fits:
      assert results.read([str(tmp_path)])[0]
      continue
    with pytest.raises(ValueError, match=f"{tmp_path}/results.json is not of this version's form"):
      results.read([str(tmp_path)])
