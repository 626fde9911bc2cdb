"""config.search: what it means for the rope, and what is refused before anything is read."""

import numpy as np
import pytest
import tiny

from rope_jax import config, resolve, rope
from rope_jax.search import settings
from rope_jax.search.candidate import candidate
from rope_jax.validate import validate

SMALL = dict(population=6, generations=3, mutations=2, crossovers=2, parents=4)
DRAWN = [
  candidate(np.sort(np.random.default_rng(i).uniform(1, 5, 8)), start_tokens=4 * i)
  for i in range(2)
]


@pytest.fixture
def c(tmp_path):
  c = tiny.run_config(tiny.text_folder(tmp_path / "text", documents=1), steps=0)
  c.rope.update(original_context=32, context=128, scaling="longrope")
  c.search.method = "longrope"
  c.search.longrope.update(SMALL)
  c.search.batch_size = 4
  c.evals = config.ConfigDict()
  return c


@pytest.mark.parametrize("resonance", [False, True])
def test_a_candidate_has_the_rope_of_a_config_with_its_factors(c, tmp_path, resonance):
  c.rope.resonance = resonance
  stage = settings.stage(c, str(tmp_path))
  for x in DRAWN[:2]:
    config.write_json(str(tmp_path / "factors.json"), stage.lists(x))
    expected = resolve.rope(settings.searched(c, str(tmp_path)))
    positions = np.arange(128)
    for a, b in zip(rope.cos_sin(stage.rope_of(x), positions), rope.cos_sin(expected, positions)):
      np.testing.assert_array_equal(a, b)


def test_the_long_factors_of_a_recovery_may_be_those_of_another_run(c, tmp_path):
  long = tuple(np.linspace(1, 4.5, 8))
  c.search.factors = "short"
  c.search.longrope.start_tokens = (0,)
  c.rope.longrope.long_factor = long
  here = settings.stage(c, str(tmp_path / "short"))
  c.rope.longrope.long_factor = ()
  (tmp_path / "long").mkdir()
  config.write_json(str(tmp_path / "long/factors.json"), dict(long_factor=list(long)))
  c.search.base = "run:long"
  validate(c)
  there = settings.stage(c, str(tmp_path / "short"))
  assert here.long.factors == there.long.factors and here.initial == there.initial
  c.rope.longrope.long_factor = long
  with pytest.raises(ValueError, match="long_factor=.*empty where search.base"):
    validate(c)


def test_a_run_with_a_search_is_read_back(c, tmp_path):
  c.search.fitness = config.needle(lengths=(420,))
  config.write(c, str(tmp_path))
  assert config.read(str(tmp_path)).search == c.search


def test_nothing_found_yet_is_said_where_factors_are_wanted(c, tmp_path):
  with pytest.raises(ValueError, match="search.method='longrope'.*launch/search.py"):
    settings.searched(c, str(tmp_path))
  with pytest.raises(ValueError, match="still to be found"):
    resolve.rope(c)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(method="longrop"), "search.method='longrop': expected one of.*longrope2"),
    (dict(factors="both"), "search.factors='both'"),
    (dict(factor=0.5), "search.factor=0.5"),
    (dict(batch_size=-1), "search.batch_size=-1"),
    (dict(init_from="nowhere"), "search.init_from='nowhere'"),
    (dict(initial="nowhere.json"), "search.initial='nowhere.json'"),
    (dict(base="nowhere.json"), "search.base='nowhere.json'"),
    ({"gradient.steps": 3}, "search.gradient.steps=3.*does not use it"),
    ({"fitness.lengths": (64, 128)}, "search.fitness.lengths.*one length"),
    ({"fitness.lengths": (32,)}, "above rope.original_context=32"),
    ({"fitness.lengths": (256,)}, "at most rope.context=128"),
    ({"fitness.every_steps": 3}, "search.fitness.every_steps=3"),
    ({"fitness.files": "nowhere*"}, "search.fitness.files='nowhere.*'"),
    ({"fitness.type": "needle"}, "config.search.fitness.*unknown to type 'needle'"),
    (dict(method="", batch_size=0), "search.longrope=.*searches nothing"),
    ({"longrope.parents": 99}, "search.longrope.population=6: expected at least 99"),
    ({"fitness.files": "split:trian"}, "search.fitness.files='split:trian'"),
    ({"data.positions": "mixed"}, "search.longrope.start_tokens=.*with data.positions='mixed'"),
    (dict(factors="short"), "rope"),
    ({"rope.scaling": "yarn"}, "rope.scaling='yarn': expected 'longrope'"),
    ({"rope.longrope.start_tokens": 3}, "rope.longrope.start_tokens=3"),
    ({"rope.longrope.long_factor": (1.0,) * 8}, "rope.longrope.long_factor"),
    ({"train.rope": "unscaled"}, "train.rope='unscaled'"),
  ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_read(c, change, message):
  c.search.longrope.start_tokens = (0, 3)
  for key, value in change.items():
    *blocks, name = key.split(".")
    block = c if key.startswith(("rope.", "train.", "data.")) or key == "seed" else c.search
    for b in blocks:
      block = block[b]
    block[name] = value
  with pytest.raises(ValueError, match=message):
    validate(c)
