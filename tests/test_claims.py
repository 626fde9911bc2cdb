"""Claims: what they compare, and what they say of it."""

import re

import numpy as np
import pytest
import tiny
from scipy import stats

from rope_jax import claims, config, markdown
from rope_jax.claims import CLAIMS, PRESETS, record, runner, small, statistics
from rope_jax.train import state

TRAINED = [name for name in CLAIMS if CLAIMS[name].runs("mini", "")]


# ---- Statistics


def test_intervals_hold_the_mean_as_often_as_they_say():
  rng = np.random.default_rng(0)
  draws = rng.normal(3.0, 2.0, (4000, 3))
  found = [statistics.interval(x) for x in draws]
  held = np.mean([x.low <= 3.0 <= x.high for x in found])
  assert abs(held - 0.95) < 0.015
  one = found[0]
  low, high = stats.t.interval(0.95, 2, draws[0].mean(), stats.sem(draws[0]))
  np.testing.assert_allclose([one.low, one.high], [low, high], rtol=1e-12)


def test_one_seed_has_no_interval_and_no_sign():
  one = statistics.interval([2.5])
  assert one.sign == 0 and one.shown() == "2.50"
  with pytest.raises(ValueError):
    statistics.interval([])


def test_a_reduction_is_of_pairs_and_positive_where_ours_is_lower():
  found = statistics.reduction([9.0, 18.0, 27.1], [10.0, 20.0, 30.0])
  assert found.mean == pytest.approx((10 + 10 + 100 * 2.9 / 30) / 3) and found.sign == 1
  assert statistics.reduction([11.0, 22.0, 33.1], [10.0, 20.0, 30.0]).sign == -1
  with pytest.raises(ValueError):
    statistics.reduction([1.0], [1.0, 2.0])


def test_a_slope_is_that_of_each_seed():
  found = statistics.slope([2, 3, 4], [[1, 3, 5], [10, 12.5, 15], [0, 1.5, 3]])
  assert found.mean == pytest.approx(2.0) and found.seeds == 3


def test_tables_are_markdown_of_one_width():
  text = markdown.table(("a", "b"), [("x", "1"), ("yy", "22.5")])
  assert text.splitlines() == ["| a  |    b |", "|----|-----:|", "| x  |    1 |", "| yy | 22.5 |"]
  with pytest.raises(ValueError):
    markdown.table(("a", "b"), [("x",)])


# ---- What is compared


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_every_run_of_every_claim_can_be_run(claim, preset):
  found = runner.runs(claim, preset)
  runner.check(found, found, "tpu" if preset == "paper" else "cpu")


def test_a_run_that_does_not_fit_what_it_starts_from_is_refused_before_any_starts():
  found = runner.runs("posgen-table1", "mini")
  name = "posgen_cot_disjoint_resonance_yarn_after_s0"
  found[name].rope.resonance = False
  with pytest.raises(ValueError, match=f"{name}: config.rope.resonance=False: the run"):
    runner.check(found, found, "cpu")


def test_weights_that_no_run_starts_from_are_refused():
  for claim, preset in (("posgen-table1", "paper"), ("resonance-theory", "paper"),
                        ("smollm2-16k", "mini")):  # fmt: skip
    with pytest.raises(ValueError, match="--init_from=x"):
      runner.runs(claim, preset, "x")
  assert runner.runs("smollm2-16k", "paper", "x")["smollm2_pi"].init_from == "x"


def test_a_digest_is_of_all_that_a_run_rests_on_but_not_of_where_weights_lie():
  found = runner.runs("psc-table", "mini")
  before = {name: record.digest(name, found) for name in found}
  assert len(set(before.values())) == len(found)
  found["small_s1"].train.steps += 1
  changed = {name for name in found if record.digest(name, found) != before[name]}
  assert changed == {name for name in found if "_s1" in name}
  here, there = (runner.runs("smollm2-16k", "paper", x) for x in ("/here", "/there"))
  assert record.digest("smollm2_pi", here) == record.digest("smollm2_pi", there)


def test_an_unknown_preset_is_refused():
  with pytest.raises(ValueError, match="preset='maxi'"):
    runner.runs("psc-table", "maxi")


def _sizes(c) -> int:
  """Parameters that are trained."""
  c = c.copy_and_resolve_references()
  if c.rope.longrope.factors.startswith("run:"):
    c.rope.scaling, c.rope.longrope.factors = "pi", ""
  shapes = state.abstract_variables(c, tiny.mesh())
  return sum(
    int(np.prod(x.shape)) for name in ("lora", "phase") for x in _leaves(shapes.get(name, {}))
  )


def _leaves(tree):
  for x in tree.values():
    yield from _leaves(x) if isinstance(x, dict) else [x]


@pytest.mark.parametrize(
  "claim, preset, psc, matched",
  [
    ("psc-table", "mini", "psc_s1_x4_pi_psc", "psc_s1_x4_pi_matched"),
    ("psc-table", "paper", "psc_s1_x4_pi_psc", "psc_s1_x4_pi_matched"),
    ("smollm2-16k", "mini", "smollm2_s0_pi_psc", "smollm2_s0_pi_matched"),
  ],
)
def test_the_control_has_as_many_parameters_and_differs_in_nothing_else(
  claim, preset, psc, matched
):
  found = runner.runs(claim, preset)
  a, b = found[psc], found[matched]
  assert 0 <= _sizes(b) / _sizes(a) - 1 < 0.02
  changed = {k for k in config._flat(a) if config._flat(a)[k] != config._flat(b)[k]}
  assert changed == {"rope.phase", "lora.rank", "lora.alpha"}
  assert a.lora.alpha / a.lora.rank == b.lora.alpha / b.lora.rank


def test_the_arms_of_a_seed_share_base_data_and_schedule():
  found = runner.runs("psc-table", "mini")
  for name, c in found.items():
    seed = int(re.search(r"_s(\d)", name)[1])
    assert c.seed == seed and c.init_from in ("", "run:" + small.base_name(seed))
    if c.train.steps and c.init_from:
      assert c.train.steps * c.train.batch_size * c.rope.context == 60 * small.TOKENS
      assert c.train.learning_rate == 2e-3


# ---- What is said of it


def test_what_is_below_and_what_is_above():
  assert statistics.interval([1.0, 2.0]).below().startswith("1.50 [-4.85, 7.85]% below")
  assert statistics.interval([-1.0, -2.0]).below().startswith("1.50 [-4.85, 7.85]% above")
  assert statistics.interval([3.0]).says("wins", "loses") == "is of one seed, so not known"
  assert statistics.interval([3.0, 3.1]).says("wins", "loses") == "wins"


def _psc_results(psc: float, matched: float, growth: float = 0.0) -> dict:
  """Results in which LoRA r=8 has perplexity 10 and the others are that many per cent below it."""
  out = {}
  for name, c in runner.runs("psc-table", "mini").items():
    arm, step = name.rpartition("_")[2], c.rope.context // small.WINDOW
    cut = dict(psc=psc + growth * np.log2(step / 4), matched=matched).get(arm, 0.0)
    ppl = (10 + 0.01 * c.seed) * (1 - cut / 100 - 1e-4 * c.seed * (arm == "psc"))
    if c.evals:
      lengths = c.evals.perplexity.lengths
      out[name] = dict(perplexity={str(n): dict(ppl=ppl, metric="ppl") for n in lengths})
  return out


def test_the_verdict_on_psc_follows_the_numbers():
  text = claims.psc_table.report(_psc_results(psc=2.0, matched=3.0), "mini")
  assert "below LoRA r=8 in 9 of 9 cases, beyond the 95% interval in 9" in text
  assert "PSC is below LoRA of as many parameters in 0 of 9 cases" in text
  assert "above it beyond the interval in 9" in text


def test_growth_with_the_window_is_its_slope():
  text = claims.psc_table.report(_psc_results(psc=1.0, matched=0.0, growth=0.5), "mini")
  (row,) = [x for x in text.splitlines() if x.startswith("| yarn ") and x.count("|") == 4]
  assert row.split("|")[2].strip().startswith("+0.50")


def test_the_order_of_the_ablation_follows_the_numbers():
  results = {}
  for rank, method in enumerate(("ntk", "pi", "ntk_by_parts", "yarn")):
    for seed in small.SEEDS:
      for trained in (False, True):
        name = f"yarn_s{seed}_{method}_{'trained' if trained else 'before'}"
        ppl = dict(metric="ppl", ppl=20 - rank + 0.01 * seed)
        results[name] = dict(perplexity={"256": ppl, "4096": ppl})
  verdict = claims.yarn_ablation.report(results, "mini").partition("Verdict")[2]
  assert verdict.count(" holds ") == 8 and "4,096" in verdict
  assert "other way round" not in verdict


def _posgen_results(accuracy: dict) -> dict:
  """Results in which every task has these accuracies out of distribution, by arm."""
  out = {}
  for name, c in runner.runs("posgen-table1", "mini").items():
    arm = re.search(r"(disjoint|combinations)_(\w+)_s\d", name)[2]
    value = accuracy[arm] + 0.001 * c.seed * (1 + arm.startswith("resonance"))
    place = dict(accuracy=value, start=64, end=256)
    column = dict(place, by_position=[dict(place, end=96), dict(place, start=96)])
    within = dict(place, accuracy=0.9, start=4, end=64)
    out[name] = dict(posgen={"in distribution": within, "out of distribution": column})
  return out


POSGEN = dict(rope=0.5, resonance=0.4, yarn=0.6, resonance_yarn=0.7, yarn_after=0.3,
              resonance_yarn_after=0.3)  # fmt: skip


def test_the_verdict_on_posgen_follows_the_numbers():
  text = claims.posgen_table1.report(_posgen_results(POSGEN), "mini")
  said = [line for line in text.splitlines() if line.startswith("- ")]
  assert len(said) == 12
  (recursive,) = [x for x in said if x.startswith("- Recursive, disjoint, RoPE: Resonance loses")]
  assert (
    "-9.9 [" in recursive and "paper -2.65" in recursive and recursive.endswith(", as published")
  )
  (cot,) = [x for x in said if x.startswith("- CoT, disjoint, RoPE: Resonance loses")]
  assert cot.endswith("NOT as published")
  assert sum("YaRN: Resonance wins, +10.1" in x for x in said) == 4
  assert sum("YaRN after: Resonance is not told apart" in x for x in said) == 4


def test_the_figure_of_posgen_has_a_panel_for_each_task(tmp_path):
  results = {n: r for n, r in _posgen_results(POSGEN).items() if "_cot_" not in n}
  claims.posgen_table1.figure(results, "mini", str(tmp_path / "f.svg"))
  text = (tmp_path / "f.svg").read_text()
  parts = [dict(start=64, end=96, accuracy=x) for x in (0.2, 0.6, 0.4)]
  bars = dict(start=64, end=96, accuracy=pytest.approx(0.4), low=0.2, high=0.6)
  assert claims.posgen_table1._over_seeds(tuple(parts)) == bars
  assert "<!-- Semi-recursive, combinations data -->" in text
  assert "<!-- Recursive, disjoint data -->" in text and "CoT" not in text


def test_the_verdict_on_dimensions_is_of_disturbance_and_perplexity():
  dims = claims.dprope_ablation.DIMS["mini"]

  def report(ppl_of):
    runs = {f"dprope_n{n}": {"16384": dict(ppl=ppl_of(n), stderr=0.1)} for n in dims}
    text = claims.dprope_ablation.report({k: dict(perplexity=v) for k, v in runs.items()}, "mini")
    disturbed = {int(n): float(d) for n, d in
                 re.findall(r"n-hat = (\d+) +\| +\d+ \| +([\d.]+) \|", text)}  # fmt: skip
    return text.splitlines()[-1], disturbed

  _, disturbed = report(float)
  assert set(disturbed) == set(dims) - {0} and len(set(disturbed.values())) > 3
  least = min(disturbed.values()) - 0.01  # that of t = 0
  verdict, _ = report(lambda n: disturbed.get(n, least))
  assert "has the least perplexity" in verdict and "settings: +" in verdict
  verdict, _ = report(lambda n: -disturbed.get(n, least))
  assert "does not have the least perplexity" in verdict and "settings: -" in verdict
  assert "standard error)" not in verdict


def test_the_verdict_on_smollm2_is_of_pairs_and_none_on_one_seed():
  found = dict(lora=10.0, matched=8.0, psc=9.0)
  results = {}
  for name in runner.runs("smollm2-16k", "mini"):
    ppl = {str(n): dict(ppl=found.get(name.rpartition("_")[2], 20.0)) for n in (2048, 8192, 16384)}
    passkey = {"8192": dict(accuracy=0.75, samples=4)}
    results[name] = dict(prose=ppl, code=ppl, passkey=passkey)
  text = claims.smollm2_16k.report(results, "mini")
  assert text.count("PSC 10.00% below LoRA r=8 and 12.50% above LoRA r=34") == 4
  assert "no verdict on PSC" in text and text.count("3/4") == 11
  assert "prose, dprope 20.00, pi 20.00" in text


def test_the_figure_of_the_ablation_has_what_there_is(tmp_path):
  part = dict(metric="ppl", ppl=9.0, stderr=0.1, by_position=[])
  run = dict(perplexity={"256": dict(part), "4096": dict(part)})
  value = dict(
    claim="yarn-ablation", preset="mini", runs={"yarn_s0_yarn_trained": dict(results=run)}
  )
  assert record.figure(value, str(tmp_path / "f.svg"))
  text = (tmp_path / "f.svg").read_text()
  assert "YaRN, trained" in text and "untouched" not in text
  for nothing in (dict(value, claim="resonance-theory"), dict(value, runs={})):
    assert not record.figure(nothing, str(tmp_path / "g.svg"))


def test_reports_can_be_made_of_nothing_and_of_a_part():
  for name in TRAINED:
    assert "too few runs" in CLAIMS[name].report({}, "mini")
  one = {n: r for n, r in _posgen_results(POSGEN).items() if n.endswith("_s1")}
  assert "of one seed, so not known" in claims.posgen_table1.report(one, "mini")
  part = dict(list(_psc_results(1.0, 0.0).items())[:9])
  assert "x16" in claims.psc_table.report(part, "mini")


def test_table_3_is_reproduced():
  text = claims.dprope_table3.report({}, "mini")
  differences = [float(x) for x in re.findall(r"([+-][\d.]+)%", text)]
  assert len(differences) == 8 and max(map(abs, differences)) < 1
  assert max(abs(x) for x in differences[:3] + differences[4:7]) <= 0.5
  assert "Verdict: reproduced" in text


def test_resonance_theory_holds():
  text = claims.resonance_theory.report({}, "mini")
  assert re.search(r"pre-critical pairs of 64 +\| +46 \|", text) and "7.058e+51" in text
  assert "without: holds" in text and "Verdict: reproduced" in text
