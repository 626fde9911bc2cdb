"""Methods of search as functions of numbers: what they draw, what they keep, what they find."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from rope_jax import rope
from rope_jax.search import METHODS, Space, gradient, longrope2
from rope_jax.search.candidate import candidate, mix, redraw

LLAMA3 = rope.base(head_dim=128, theta=5e5, original_context=8192)
PHI3 = rope.base(head_dim=96, theta=1e4, original_context=2048)
TINY = rope.base(head_dim=48, theta=1e4, original_context=128)
SPACE = Space(TINY, 8.0, seed=3)
EVOLUTIONS = [name for name in METHODS if name != "gradient"]
SMALL = dict(population=12, generations=6, mutations=5, crossovers=5, parents=6)


def far_from(target):
  """A smooth fitness whose best factors are known."""
  target = np.log(np.asarray(target))

  def fitness(candidates, title=""):
    return [float(np.mean((np.log(x.factors) - target) ** 2)) for x in candidates]

  return fitness


TARGET = np.exp(np.linspace(0, np.log(9), 24) ** 1.2 / np.log(9) ** 0.2)


class Recorder:
  """A fitness that keeps what it was asked for."""

  def __init__(self, fitness):
    self.fitness, self.asked = fitness, []

  def __call__(self, candidates, title=""):
    self.asked.append(list(candidates))
    return self.fitness(candidates, title)

  @property
  def all(self):
    return [x for group in self.asked for x in group]


def run(name, space=SPACE, **options):
  own = {f.name for f in dataclasses.fields(METHODS[name])}
  method = METHODS[name](**{k: v for k, v in (SMALL | options).items() if k in own})
  method.check(space)
  record = Recorder(far_from(TARGET))
  return method, record, method.search(space, record)


def test_redrawing_is_drawing_and_discarding():
  # Sorted draws are ordered independent draws: compared where there are no ties.
  rng, low, high, step = np.random.default_rng(0), 1.0, 3.0, 0.5
  start, chosen = np.array([1.0, 1.5, 2.0, 3.0]), np.array([True, True, True, False])
  grid = np.arange(low, high + 1e-9, step)
  expected = {x for x in itertools.product(grid, repeat=3) if x[0] < x[1] < x[2] <= 3.0}
  found = collections.Counter()
  for _ in range(6000):
    drawn = redraw(rng, start, chosen, low, high, step)
    assert np.all(np.diff(drawn) >= 0) and drawn[3] == 3.0
    found[tuple(drawn[:3])] += 1
  counts = np.array([found[x] for x in expected])
  assert counts.min() > 0  # 10 triples without ties, each as likely
  chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
  assert chi2 < 27.9  # 0.999 quantile of nine degrees of freedom


def test_redrawn_factors_stay_between_those_that_stay():
  rng = np.random.default_rng(1)
  factors = np.sort(rng.uniform(1, 10, 64))
  for _ in range(200):
    chosen = rng.random(64) < 0.3
    drawn = redraw(rng, factors, chosen, 1.0, 10.0, 0.01)
    np.testing.assert_array_equal(drawn[~chosen], factors[~chosen])
    assert np.all(np.diff(drawn) >= 0) and drawn[0] >= 1 and drawn[-1] <= 10
    moved = drawn[drawn != factors]
    np.testing.assert_allclose(moved, np.round(moved, 2), atol=1e-9)


def test_mixing_keeps_the_order_and_uses_both_parents():
  rng = np.random.default_rng(2)
  for _ in range(200):
    a, b = np.sort(rng.uniform(1, 5, 32)), np.sort(rng.uniform(1, 5, 32))
    child = mix(rng, a, b)
    assert np.all(np.diff(child) >= 0) and np.all((child == a) | (child == b))
  assert 0 < np.mean(child == a) < 1


@pytest.mark.parametrize("name", EVOLUTIONS)
def test_nothing_is_evaluated_twice_and_all_of_it_is_monotone(name):
  method, record, best = run(name)
  keys = [x.key for x in record.all]
  assert len(set(keys)) == len(keys) == method.budget(SPACE)
  assert [len(group) for group in record.asked[1:]] == [10] * 6
  for x in record.all:
    assert x.monotone and len(x.factors) == 24 and x.factors[0] >= 1 - 1e-9
  fitness = record.fitness(record.all)
  assert best.key == record.all[int(np.argmin(fitness))].key


@pytest.mark.parametrize("name", EVOLUTIONS)
def test_a_search_is_a_function_of_its_seed(name):
  (_, a, best_a), (_, b, best_b) = run(name), run(name)
  assert [x.key for x in a.all] == [x.key for x in b.all] and best_a == best_b
  _, c, _ = run(name, dataclasses.replace(SPACE, seed=4))
  assert [x.key for x in a.all] != [x.key for x in c.all]


@pytest.mark.parametrize("name", EVOLUTIONS)
def test_evolution_improves_on_its_first_generation(name):
  _, record, best = run(name, generations=25)
  first = min(record.fitness(record.asked[0]))
  assert record.fitness([best])[0] < 0.9 * first


def test_longrope_starts_from_pi_ntk_and_yarn():
  _, record, _ = run("longrope")
  i = np.arange(24)
  pi, ntk, yarn = (np.array(x.factors) for x in record.asked[0][:3])
  np.testing.assert_allclose(pi, 8.0)
  np.testing.assert_allclose(ntk, 8 ** (2 * i / 46), rtol=1e-12)
  np.testing.assert_allclose(TINY.inv_freq / yarn, rope.yarn(TINY, 8.0).inv_freq, rtol=1e-12)
  assert max(x.factors[-1] for x in record.all) <= 1.25 * 8 + 1e-9
  assert {x.start_tokens for x in record.all} > {0}


def test_the_released_search_has_one_seed_whose_factors_are_blended():
  _, record, _ = run("longrope_released")
  # The ramp by hand: correction dims of 32 and 1 rotations in 128 tokens, head_dim 48.
  low, high = (48 * np.log(128 / (n * 2 * np.pi)) / (2 * np.log(1e4)) for n in (32, 1))
  low, high = max(np.floor(low), 0), np.ceil(high)
  ramp = np.clip((np.arange(24) - low) / (high - low), 0, 1)
  np.testing.assert_allclose(record.asked[0][0].factors, 1 + 7 * ramp, rtol=1e-9)
  assert {x.start_tokens for x in record.all} == {0}
  highest = max(x.factors[-1] for x in record.all)
  assert 8 < highest <= 9 + 0.011  # the grid may pass 1 + s by a step, as in the release


def test_the_released_search_takes_a_list_in_place_of_its_seed():
  given = candidate(np.linspace(1, 8, 24), name="initial")
  _, record, _ = run("longrope_released", dataclasses.replace(SPACE, initial=(given,)))
  assert record.asked[0][0] == given


def test_pieces_are_1_then_free_then_s():
  given = candidate([*np.linspace(1, 7.5, 22), 8.2, 8.7], name="initial")
  _, record, _ = run("longrope_pieces", dataclasses.replace(SPACE, initial=(given,)), generations=9)
  assert all(0 <= x.genes[0] < x.genes[1] < 24 for x in record.all[1:])
  # As in the release, which never draws the last two; so s is in none of them but there.
  assert {x.factors[-2:] for x in record.all} == {given.factors[-2:]}
  assert any(x.factors[1] == 1 for x in record.all)


@pytest.mark.parametrize("s", [2**0.5, 1.5, 3.0, 31.25])
@pytest.mark.parametrize("name", ["longrope", "longrope_released", "longrope2"])
def test_factors_that_round_badly_are_no_obstacle(name, s):
  _, record, _ = run(name, Space(TINY, s))
  assert all(x.monotone for x in record.all)


def test_what_the_user_gives_is_among_the_first_candidates():
  given = candidate(np.linspace(1, 8, 24), name="initial")
  _, record, _ = run("longrope", dataclasses.replace(SPACE, initial=(given,)), population=6)
  assert record.asked[0][0] == given


@pytest.mark.parametrize("base, s, ten, one", [(PHI3, 64, 19, 31), (LLAMA3, 16, 24, 35)])
def test_critical_pairs_go_from_ten_periods_to_one(base, s, ten, one):
  assert longrope2.critical_range(Space(base, s)) == (ten, one)


def test_longrope2_searches_the_critical_pair_and_the_factors_from_there_on():
  _, record, _ = run("longrope2", generations=10)
  for x in record.all:
    c = int(x.genes[0])
    tail = x.factors[c]
    np.testing.assert_allclose(x.factors[:c], tail ** (np.arange(c) / c), rtol=1e-12)
    assert x.factors[c] >= 8 and x.factors[-1] <= 16
    r = rope.longrope2(TINY, 8.0, seq_len=1024, critical=c, tail=x.factors[c:])
    np.testing.assert_allclose(TINY.inv_freq / r.inv_freq, x.factors, rtol=1e-12)
  first = {x.genes[0] for x in record.asked[0]}
  assert first == set(range(2, 9))


def test_the_released_longrope2_has_the_seeds_of_llama3():
  method = METHODS["longrope2_released"](population=8, generations=0, parents=4, critical=33)
  record = Recorder(lambda candidates, title="": [0.0] * len(candidates))
  method.search(Space(LLAMA3, 16.0), record)
  for j, x in enumerate(record.asked[0][:8]):
    np.testing.assert_allclose(x.factors[33:], 32 + 3 * j + 0.1 * np.arange(31), rtol=1e-12)
    np.testing.assert_allclose(x.factors[:33], (32 + 3 * j) ** (np.arange(33) / 33), rtol=1e-12)
  assert len(record.asked[0]) == 16
  assert all(np.all(np.diff(x.factors) > 0) for x in record.asked[0])


def test_descent_finds_the_factors_that_a_smooth_fitness_is_best_for():
  target = np.log(TARGET)

  def slope(x, samples, step):
    return 2 * (np.log(x.factors) - target) / np.array(x.factors) / 24

  method = METHODS["gradient"](steps=300, every=20)
  record = Recorder(far_from(TARGET))
  best = method.search(SPACE, record, slope)
  assert len(record.all) == method.budget(SPACE)
  assert [x.name for x in record.asked[0]] == ["pi", "ntk", "yarn"]
  assert record.fitness([best])[0] < 0.02 * min(record.fitness(record.asked[0]))
  assert all(x.monotone and x.factors[0] >= 1 and x.factors[-1] <= 16 for x in record.all[3:])


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn"])
def test_parameters_of_factors_give_nearly_these_factors(name):
  factors = SPACE.of_method(name).factors
  again = gradient.factors(gradient.parameters_of(factors, 16.0), 16.0)
  np.testing.assert_allclose(again, factors, rtol=0.01)


def test_any_parameters_are_monotone_factors_within_the_bounds():
  rng = np.random.default_rng(0)
  for scale in (0.1, 1, 30):
    factors = np.asarray(gradient.factors(rng.normal(size=25) * scale, 16.0))
    assert np.all(np.diff(factors) >= 0) and factors[0] >= 1 and factors[-1] <= 16 * (1 + 1e-6)


FALLING = (candidate([2.0] * 12 + [1.0] * 12),)


@pytest.mark.parametrize(
  "name, space, options, message",
  [
    ("longrope", Space(TINY, 8.0, FALLING), {}, "search.initial.*do not fall"),
    ("gradient", Space(TINY, 8.0, FALLING), {}, "search.initial.*do not fall"),
    ("longrope", SPACE, dict(upper=1.001), "search.longrope.upper=1.001.*no factor could change"),
    ("longrope2", SPACE, dict(upper=7.0), "search.longrope2.upper=7.0"),
    ("longrope2_released", SPACE, dict(upper=8.05), "upper=8.05.*largest seed"),
    ("longrope", SPACE, dict(population=2, parents=2), "population=2: expected at least 3"),
    ("longrope", SPACE, dict(parents=13), "population=12: expected at least 13"),
    ("longrope", SPACE, dict(parents=1), "parents=1: expected at least 2"),
    ("longrope", SPACE, dict(probability=0.0), "probability=0.0"),
    ("longrope", SPACE, dict(step=0.0), "step=0.0"),
    ("longrope", SPACE, dict(start_tokens=()), "start_tokens"),
    ("longrope", SPACE, dict(generations=-1), "generations=-1"),
    ("longrope2", Space(TINY, 8.0, FALLING), {}, "search.initial.*closed form"),
    ("gradient", SPACE, dict(steps=0), "gradient.steps=0"),
    ("gradient", SPACE, dict(upper=0.5), "gradient.upper=0.5"),
  ],
)
def test_options_without_a_search_are_refused_by_name(name, space, options, message):
  own = {f.name for f in dataclasses.fields(METHODS[name])}
  method = METHODS[name](**{k: v for k, v in (SMALL | options).items() if k in own})
  with pytest.raises(ValueError, match=message):
    method.check(space)


def test_a_space_that_is_used_up_says_so():
  small = Space(rope.base(head_dim=4, theta=1e4, original_context=64), 1.1, seed=0)
  method = METHODS["longrope"](**SMALL | dict(step=0.1, start_tokens=(0,)))
  with pytest.raises(ValueError, match="search.longrope.*no new monotone candidate"):
    method.search(small, far_from([1.0, 1.1]))
