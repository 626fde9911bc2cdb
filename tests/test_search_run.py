"""Searches of models: what is computed, kept, resumed, written and read again."""

import json
import os

import jax
import numpy as np
import pytest
import tiny

from rope_jax import config, evals, factors, resolve, rope
from rope_jax.search import fitness as fitness_lib
from rope_jax.search import run as search_lib
from rope_jax.search import settings
from rope_jax.search.candidate import candidate
from rope_jax.train import loop, sharding, state
from rope_jax.train.lock import Lock
from rope_jax.validate import validate

SMALL = dict(population=6, generations=3, mutations=2, crossovers=2, parents=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
  """A run whose rope matters to its loss."""
  c = tiny.run_config(folder, steps=40, learning_rate=1e-2)
  c.rope.original_context = c.rope.context = 32
  c.evals = config.ConfigDict()
  workdir = str(tmp_path_factory.mktemp("search") / "trained")
  loop.train(c, workdir)
  return workdir


@pytest.fixture
def c(trained, folder):
  c = tiny.run_config(folder, steps=0)
  c.init_from = trained
  c.rope.update(original_context=32, context=128, scaling="longrope")
  c.search.method = "longrope"
  c.search.longrope.update(SMALL)
  c.search.fitness.num_samples = 3
  c.search.batch_size = 4
  c.evals = config.ConfigDict()
  return c


def run(c, workdir, **options):
  validate(c)
  return search_lib.search(c, str(workdir), **options)


def lines(workdir):
  return [json.loads(x) for x in (workdir / "search.jsonl").read_text().splitlines()]


def without(method, c):
  """The same search by another method, with the small settings where it has them."""
  c.search.longrope.update(config.base().search.longrope)
  c.search.method = method
  if method == "gradient":
    c.search.gradient.update(steps=6, every=3, samples=2)
  else:
    c.search[method].update(SMALL | dict(population=9))
  return c


class Compilations:
  """Programs that the backend compiles while this is entered, small ones for arrays included."""

  def __enter__(self):
    self.names = []
    self._listener = lambda name, *_, **__: self.names.append(name)
    jax.monitoring.register_event_duration_secs_listener(self._listener)
    return self

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._listener)

  @property
  def count(self):
    return sum(name.endswith("backend_compile_duration") for name in self.names)


def test_a_whole_search_compiles_one_program(c, tmp_path, monkeypatch):
  made = []
  compile_ = fitness_lib.TokenFitness._compile
  monkeypatch.setattr(
    fitness_lib.TokenFitness, "_compile",
    lambda self, n: made.append(0) or compile_(self, n),
  )  # fmt: skip
  call, during = fitness_lib.TokenFitness.__call__, []

  def watched(self, group):
    with Compilations() as found:
      values = call(self, group)
    during.append(found.count)
    return values

  monkeypatch.setattr(fitness_lib.TokenFitness, "__call__", watched)
  found = run(c, tmp_path)
  assert len(made) == 1  # the program, for the one shape of a batch
  # 6 at the start and 4 in each of 3 generations, at most 4 at a time.
  assert len(during) == 2 + 3 and found["provenance"]["evaluations"] == 18
  assert sum(during) == 0  # no candidate compiles anything more


def test_the_derivative_is_one_program_more(c, tmp_path):
  fitness, _ = direct(without("gradient", c), tmp_path)
  base = resolve.base(c)
  for step, shift in enumerate((0.0, 0.1, 0.2), 1):
    fitness.gradient(base, candidate(np.linspace(1, 4, 8) + shift), 1, step)
  assert fitness._descend._cache_size() == 1


def direct(c, tmp_path, **options):
  """The fitness of a config's search as an object, and its stage."""
  stage, entry = settings.stage(c, str(tmp_path)), settings.fitness_entry(c)
  source = settings.model_config(c)
  mesh = sharding.make_mesh(c.mesh, 8, must_divide=False)
  jax.sharding.set_mesh(mesh)
  text = loop.load_tokenizer(source, str(tmp_path))
  data = fitness_lib.rows(entry, evals.Subject(c, text, None))
  model = state.Llama(state.from_config(c))
  variables = state.initial_variables(source, mesh, str(tmp_path))
  given = dict(candidates=4, samples=1, chunk=32) | options
  return fitness_lib.TokenFitness(model, variables, mesh, data, stage.rope_of, **given), stage


@pytest.fixture(autouse=True)
def _no_mesh_after():
  before = jax.sharding.get_mesh()
  yield
  jax.sharding.set_mesh(before)


DRAWN = [
  candidate(np.sort(np.random.default_rng(i).uniform(1, 5, 8)), start_tokens=4 * i)
  for i in range(6)
]


def one_at_a_time(c, tmp_path, known={}):  # noqa: B006 - of the whole module
  if not known:
    fitness, _ = direct(c, tmp_path, candidates=1)
    known["values"] = np.concatenate([fitness([x]) for x in DRAWN])
  return known["values"]


@pytest.mark.parametrize(
  "mesh, options",
  [
    (dict(data=1), dict(candidates=6)),
    (dict(data=1), dict(candidates=2, samples=2)),
    (dict(data=1), dict(candidates=0)),
    (dict(data=8), dict(candidates=8)),
    (dict(data=2, context=2, tensor=2), dict(candidates=2)),
  ],
)
def test_fitness_does_not_depend_on_how_candidates_are_batched_and_sharded(
  c, tmp_path, mesh, options
):
  c.mesh.update(data=1)
  expected = one_at_a_time(c, tmp_path)
  c.mesh.update(mesh)
  fitness, _ = direct(c, tmp_path, **options)
  found = []
  for i in range(0, len(DRAWN), fitness.candidates):
    found += fitness(DRAWN[i : i + fitness.candidates])
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert np.ptp(expected) > 5e-5 * expected[0]  # the rope matters


def test_the_gradient_is_that_of_the_fitness(c, tmp_path):
  fitness, stage = direct(without("gradient", c), tmp_path)
  base, at = resolve.base(c), np.linspace(1.2, 3.8, 8)
  found = np.array(fitness.gradient(base, candidate(at), 0, 1))
  eye = np.eye(8)
  # Where a step moves no angle far; in float32, with that much noise.
  for i in range(3, 8):
    h = 0.02 * at[i]
    up, down = fitness([candidate(at + h * eye[i]), candidate(at - h * eye[i])])
    np.testing.assert_allclose(found[i], (up - down) / (2 * h), rtol=0.05, atol=2e-4)
  some = [np.array(fitness.gradient(base, candidate(at), 1, step)) for step in (1, 2, 3, 4)]
  np.testing.assert_allclose(np.mean(some[:3], 0), found, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(some[3], some[0])  # rows in turn


@pytest.mark.parametrize("method", ["longrope", "longrope2", "gradient"])
def test_a_search_cut_off_anywhere_ends_the_same(c, tmp_path, method):
  c = c if method == "longrope" else without(method, c)
  run(c, tmp_path / "whole")
  expected = (tmp_path / "whole/factors.json").read_text()
  text = (tmp_path / "whole/search.jsonl").read_text()
  ends = [i + 1 for i, x in enumerate(text) if x == "\n"]
  cuts = (ends[0] // 2, ends[1], ends[2] + 30, ends[-2] + 5)  # within a line, and after one
  for cut in cuts if method == "longrope" else cuts[1:3]:
    (tmp_path / "cut").mkdir(exist_ok=True)
    (tmp_path / "cut/search.jsonl").write_text(text[:cut])
    run(c, tmp_path / "cut")
    assert (tmp_path / "cut/factors.json").read_text() == expected
    assert (tmp_path / "cut/search.jsonl").read_text() == text


def test_a_finished_search_reads_no_weights(c, tmp_path, monkeypatch):
  first = run(c, tmp_path)

  def refuse(*_):
    raise AssertionError("the model was built")

  monkeypatch.setattr(search_lib.Search, "_fitness_of", refuse)
  assert run(c, tmp_path) == first


def test_what_is_found_is_what_a_config_with_its_factors_evaluates_to(c, tmp_path):
  result = run(c, tmp_path)
  used = settings.searched(c, str(tmp_path))
  validate(used)
  used.evals.same = config.perplexity(
    files="split:train", lengths=(128,), protocol="truncate", num_samples=3
  )
  (evaluation,) = loop.evaluate(used, str(tmp_path / "evaluated"))["same"].values()
  value = result["provenance"]["fitness"]["value"]
  np.testing.assert_allclose(evaluation["nll"], value, rtol=1e-6)
  seeds = result["provenance"]["fitness"]["seeds"]
  assert set(seeds) == {"pi", "ntk", "yarn"} and value <= min(seeds.values())
  history = result["provenance"]["history"]
  assert [n for n, _ in history] == list(range(1, 19))
  assert all(a >= b for (_, a), (_, b) in zip(history, history[1:])) and history[-1][1] == value
  for name in ("factors.png", "fitness.png"):
    assert (tmp_path / name).stat().st_size > 5000
  provenance = result["provenance"]["settings"]
  assert provenance["config.init_from"] == c.init_from and provenance["config.seed"] == 0
  assert provenance["init_step"] == 40 and len(provenance["text"]) == 16


def test_found_factors_are_exported(c, tmp_path):
  c.search.longrope.start_tokens = (0,)
  result = run(c, tmp_path)
  r = resolve.rope(settings.searched(c, str(tmp_path)))
  lists = rope.to_hf(r)["rope_parameters"]
  np.testing.assert_allclose(lists["long_factor"], result["long_factor"], rtol=1e-12)


def test_an_extension_of_an_extension_multiplies_the_factors(c, tmp_path):
  c.rope.context = 64
  first = run(c, tmp_path / "first")
  c.rope.context = 256
  c.search.base = "run:first"
  c.search.longrope.start_tokens = (0,)
  if first["start_tokens"]:
    with pytest.raises(ValueError, match="search.base.*without start_tokens"):
      settings.stage(c, str(tmp_path / "second"))
    config.write_json(str(tmp_path / "first/factors.json"), dict(first, start_tokens=0))
  stage = settings.stage(c, str(tmp_path / "second"))
  assert stage.factor == 4 and stage.rope.original_context == 64
  np.testing.assert_allclose(
    resolve.base(c).inv_freq / stage.rope.inv_freq, first["long_factor"], rtol=1e-12
  )
  second = run(c, tmp_path / "second")
  np.testing.assert_allclose(
    second["long_factor"],
    np.multiply(first["long_factor"], second["provenance"]["searched"]),
    rtol=1e-12,
  )
  r = resolve.rope(settings.searched(c, str(tmp_path / "second")))
  assert r.context == 256
  np.testing.assert_allclose(resolve.base(c).inv_freq / r.inv_freq, second["long_factor"])


def test_short_factors_are_found_beside_long_ones(c, tmp_path):
  long = tuple(np.linspace(1, 4.5, 8))
  c = without("longrope_released", c)
  c.search.factors = "short"
  c.rope.longrope.long_factor = long
  c.rope.longrope.start_tokens = 3
  result = run(c, tmp_path)
  assert result["long_factor"] == list(long) and result["start_tokens"] == 3
  assert result["provenance"]["settings"]["config.search.factors"] == "short"
  used = settings.searched(c, str(tmp_path))
  base = resolve.base(c).inv_freq
  for n, expected in ((32, result["short_factor"]), (128, long)):
    np.testing.assert_allclose(base / resolve.rope(used, n).inv_freq, expected)
  # From the long factors, as for sqrt(4) = 2, and from no interpolation.
  first = [x["factors"] for x in lines(tmp_path)[1]["question"]["fitness"][:2]]
  np.testing.assert_allclose(first[0], np.minimum(1 + (np.array(long) - 1) / 3, 2.5))
  np.testing.assert_allclose(first[1], np.ones(8))


@pytest.mark.parametrize(
  "entry",
  [
    config.needle(lengths=(420,), num_samples=2, files="split:train"),
    config.passkey(lengths=(400,), num_samples=1),
  ],
)
def test_any_evaluation_can_be_the_fitness(c, tmp_path, entry):
  c.rope.context = 448
  c.search.fitness = entry
  c.search.batch_size = 1
  c.search.longrope.update(population=3, generations=1, parents=2, mutations=1, crossovers=1)
  result = run(c, tmp_path)
  used = settings.searched(c, str(tmp_path))
  used.evals.same = entry
  (evaluation,) = loop.evaluate(used, str(tmp_path / "evaluated"))["same"].values()
  value = result["provenance"]["fitness"]["value"]
  expected = evaluation["nll"] if entry.type == "needle" else -evaluation[evaluation["metric"]]
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-12)


def test_any_function_of_a_model_and_a_rope_can_be_the_fitness(c, tmp_path):
  seen = []

  def last_loss(subject):
    tokens = np.arange(128, dtype=np.int32)[None] % 100
    seen.append(float(subject.losses(tokens, 128)[0, -1]))
    return seen[-1]

  c.search.batch_size = 0
  result = run(c, tmp_path, fitness=last_loss)
  assert result["provenance"]["fitness"]["value"] == min(seen) and len(seen) == 18
  assert len(set(seen)) > 9 and "last_loss" in result["provenance"]["fitness"]["of"]


def test_settings_of_another_search_are_refused_by_name(c, tmp_path):
  run(c, tmp_path)
  c.seed = 1
  c.search.longrope.generations = 4
  with pytest.raises(
    ValueError,
    match=r"other settings.*config.search.longrope.generations=4 \(was 3\), config.seed=1 \(was 0",
  ):
    run(c, tmp_path)


def test_two_searches_do_not_share_a_workdir(c, tmp_path):
  with Lock(str(tmp_path), "train"):
    with pytest.raises(ValueError, match=f"--workdir={tmp_path}: another run is at work there"):
      run(c, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".train.lock"]


def test_text_that_is_too_short_is_an_error(c, tmp_path):
  c.rope.context = 8192
  with pytest.raises(ValueError, match="search.fitness.*pieces of 8192 tokens.*train split"):
    run(c, tmp_path)
  assert not os.path.exists(tmp_path / "search.jsonl")


def test_factors_of_another_rope_are_refused(c, tmp_path):
  run(c, tmp_path)
  path = str(tmp_path / "factors.json")
  for block, key, value in (
    ("rope", "theta", 5e5), ("rope", "original_context", 16), ("model", "head_dim", 32),
  ):  # fmt: skip
    other = settings.searched(c, str(tmp_path))
    other[block][key] = value
    with pytest.raises(ValueError, match=f"rope.longrope.factors.*made for {key}="):
      resolve.rope(other)
  other = settings.searched(c, str(tmp_path))
  other.rope.longrope.attention = "yarn"
  with pytest.raises(ValueError, match="made for attention='su' .here 'yarn'"):
    resolve.rope(other)
  other.rope.longrope.update(attention="su", start_tokens=3)
  with pytest.raises(ValueError, match="start_tokens=3: expected empty"):
    resolve.rope(other)
  found = factors.read(path)
  config.write_json(path, dict(found, start_tokens=5))
  c.rope.scaling = "dynamic_longrope"
  c.rope.dynamic_longrope.factors = path
  with pytest.raises(ValueError, match="no use for its start_tokens"):
    resolve.rope(c)
  config.write_json(str(tmp_path / "other.json"), dict(long_factor=[1.0] * 16))
  c.search.initial = str(tmp_path / "other.json")
  c.rope.scaling = "longrope"
  with pytest.raises(ValueError, match="search.initial.*each of the 8 pairs"):
    settings.stage(c, str(tmp_path))


def test_too_many_candidates_for_the_memory_are_an_error(c, tmp_path, monkeypatch):
  monkeypatch.setattr(fitness_lib, "_limit", lambda device: 1000)
  for size in (4, 0):
    with pytest.raises(ValueError, match="search.batch_size=.*GiB on a device"):
      direct(c, tmp_path, candidates=size)


def test_the_number_at_a_time_is_halved_until_it_fits(c, tmp_path, monkeypatch):
  need = []
  memory = fitness_lib._memory
  monkeypatch.setattr(fitness_lib, "_memory", lambda x: need.append(memory(x)) or need[-1])
  most, _ = direct(c, tmp_path, candidates=0)
  monkeypatch.setattr(fitness_lib, "_limit", lambda device: need[0] * 0.6)
  fewer, _ = direct(c, tmp_path, candidates=0)
  assert most.candidates == 64 and fewer.candidates < 64
  np.testing.assert_allclose(fewer(DRAWN[:1]), most(DRAWN[:1]), rtol=1e-6)


def test_a_line_of_another_search_is_an_error(c, tmp_path):
  run(c, tmp_path)
  found = lines(tmp_path)
  found[2]["question"]["fitness"][0]["factors"][0] += 0.5
  (tmp_path / "search.jsonl").write_text("".join(json.dumps(x) + "\n" for x in found))
  with pytest.raises(ValueError, match="search.jsonl, line 3: another search"):
    run(c, tmp_path)
