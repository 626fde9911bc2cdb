"""Claims: what they compare, how they are run again, and that the page says what came out."""

import json
import re

import numpy as np
import pytest
import tiny
from conftest import ROOT
from scipy import stats

from rope_jax import claims, config, markdown, presets
from rope_jax.claims import CLAIMS, PRESETS, page, runner, small, statistics
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
  runner.check(runner.runs(claim, preset), "tpu" if preset == "paper" else "cpu")


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
        ppl = dict(ppl=20 - rank + 0.01 * seed)
        results[name] = dict(perplexity={"256": ppl, "4096": ppl})
  verdict = claims.yarn_ablation.report(results, "mini").splitlines()[-1]
  assert verdict.count(" holds ") == 3 and "4,096" in verdict
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
  assert "<!-- Semi-recursive, combinations data -->" in text
  assert "<!-- Recursive, disjoint data -->" in text and "CoT" not in text


def test_the_verdict_on_dimensions_is_of_disturbance_and_perplexity():
  dims = claims.dprope_ablation.DIMS["mini"]

  def report(ppl_of):
    runs = {f"dprope_n{n}": {"16384": dict(ppl=ppl_of(n))} for n in dims}
    text = claims.dprope_ablation.report({k: dict(perplexity=v) for k, v in runs.items()}, "mini")
    disturbed = {int(n): float(d) for n, d in
                 re.findall(r"n-hat = (\d+) +\| +\d+ \| +([\d.]+) \|", text)}  # fmt: skip
    return text.splitlines()[-1], disturbed

  _, disturbed = report(float)
  assert set(disturbed) == set(dims) - {0} and len(set(disturbed.values())) > 3
  least = min(disturbed.values())
  verdict, _ = report(lambda n: disturbed.get(n, least))
  assert "has the least perplexity" in verdict and "settings: +" in verdict
  verdict, _ = report(lambda n: -disturbed.get(n, least))
  assert "does not have the least perplexity" in verdict and "settings: -" in verdict


def test_the_verdict_on_smollm2_is_of_pairs_and_none_on_one_seed():
  found = dict(lora=10.0, matched=8.0, psc=9.0)
  results = {}
  for name in runner.runs("smollm2-16k", "mini"):
    ppl = {str(n): dict(ppl=found.get(name.rpartition("_")[2], 20.0)) for n in (2048, 8192, 16384)}
    passkey = {"8192": dict(accuracy=0.75, samples=4)}
    results[name] = dict(prose=ppl, code=ppl, passkey=passkey)
  text = claims.smollm2_16k.report(results, "mini")
  assert text.count("PSC +10.00% below LoRA r=8 and -12.50% below LoRA r=34") == 4
  assert "no verdict on PSC" in text and text.count("3/4") == 11


def test_the_figure_of_the_ablation_has_what_there_is(tmp_path):
  part = dict(metric="ppl", ppl=9.0, stderr=0.1, by_position=[])
  run = dict(perplexity={"256": dict(part), "4096": dict(part)})
  value = dict(
    claim="yarn-ablation", preset="mini", runs={"yarn_s0_yarn_trained": dict(results=run)}
  )
  assert runner.figure(value, str(tmp_path / "f.svg"))
  text = (tmp_path / "f.svg").read_text()
  assert "YaRN, trained" in text and "untouched" not in text
  assert not runner.figure(dict(value, claim="resonance-theory"), str(tmp_path / "g.svg"))


def test_reports_can_be_made_of_nothing_and_of_a_part():
  for name in TRAINED:
    assert CLAIMS[name].report({}, "mini")
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


# ---- How it is run


class _Toy:
  """A claim of two runs of seconds, the second from the first."""

  __doc__ = "A toy."

  @staticmethod
  def runs(preset, init_from):
    base, extended = presets.tiny(), presets.tiny()
    for c in (base, extended):
      c.data.source = _Toy.folder
      c.model.update(num_layers=1, block_q=64, block_k=64)
      c.train.update(steps=2, batch_size=8, log_every=1)
    extended.init_from = "run:toy_base"
    extended.rope.context, extended.rope.scaling = 256, "yarn"
    extended.evals.perplexity = config.perplexity(
      lengths=(128, 256), protocol="truncate", num_samples=8, batch_size=8
    )
    return dict(toy_base=base, toy_yarn=extended)

  @staticmethod
  def report(results, preset):
    return f"{len(results)} runs"


@pytest.fixture
def toy(tmp_path, monkeypatch):
  _Toy.folder = tiny.text_folder(tmp_path / "text")
  monkeypatch.setitem(CLAIMS, "toy", _Toy)
  return tmp_path


@pytest.mark.slow
def test_a_claim_run_again_elsewhere_gives_the_same_record(toy):
  first = runner.run("toy", "mini", str(toy / "a"))
  second = runner.run("toy", "mini", str(toy / "b"))
  assert first == second and list(first["runs"]) == ["toy_base", "toy_yarn"]
  assert runner.report(first).startswith("1 runs")  # the base is not evaluated
  assert (toy / "a" / "toy.json").read_bytes() == (toy / "b" / "toy.json").read_bytes()
  assert page.read(str(toy / "a" / "toy.json")) == json.loads(json.dumps(first))


@pytest.mark.slow
def test_finished_runs_are_not_run_again_and_others_are(toy, monkeypatch):
  runner.run("toy", "mini", str(toy), only="toy_base")
  record = json.loads((toy / "toy.json").read_text())
  assert list(record["runs"]) == ["toy_base"] and "NOT COMPLETE" in runner.report(record)
  ran, execute = [], runner.execute
  monkeypatch.setattr(
    runner, "execute", lambda name, *args: (ran.append(name), execute(name, *args))
  )
  whole = runner.run("toy", "mini", str(toy))
  assert ran == ["toy_yarn"] and "NOT COMPLETE" not in runner.report(whole)
  runner.run("toy", "mini", str(toy))
  assert ran == ["toy_yarn"]


@pytest.mark.slow
def test_a_record_from_elsewhere_is_joined_and_not_made_again(toy, monkeypatch):
  there = runner.run("toy", "mini", str(toy / "there"))
  monkeypatch.setattr(runner, "execute", None)
  here = runner.run("toy", "mini", str(toy / "here"), records=[there])
  assert here == there
  other = dict(there, runs={n: dict(r, config="0") for n, r in there["runs"].items()})
  with pytest.raises(ValueError, match="--join: the run toy_base is of other settings"):
    runner.run("toy", "mini", str(toy / "here"), records=[other])
  with pytest.raises(ValueError, match="--join: versions"):
    runner.run("toy", "mini", str(toy / "here"), records=[dict(there, versions={})])


def test_a_part_of_a_claim_brings_what_it_starts_from():
  found = runner.runs("psc-table", "mini")
  part = runner.chosen(found, "psc_s2_x8_longrope_psc")
  assert list(part) == ["small_s2", "psc_s2_x8_longrope_search", "psc_s2_x8_longrope_psc"]
  with pytest.raises(ValueError, match="--only=nothing"):
    runner.chosen(found, "nothing")


# ---- The page


def test_the_page_has_the_tables_of_the_stored_records():
  path = str(ROOT / "docs" / "results.md")
  with open(path) as f:
    text = f.read()
  assert page.rendered(path) == text
  for claim in CLAIMS:
    assert f"<!-- {claim}: " in text or f"`{claim}`" in text, claim
  for record in (ROOT / "docs" / "results").glob("*.json"):
    assert f"results/{record.name} -->" in text


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.json")), ids=str)
def test_a_stored_record_is_whole_and_of_the_settings_that_are_run(path):
  value = page.read(str(path))
  found = runner.runs(value["claim"], value["preset"])
  assert list(value["runs"]) == list(found) and value["of"] == len(found)
  assert {n: r["config"] for n, r in value["runs"].items()} == {
    name: runner.digest(c) for name, c in found.items()
  }


def test_a_page_with_a_record_that_is_none_is_refused(tmp_path):
  (tmp_path / "other.json").write_text("{}")
  (tmp_path / "p.md").write_text("<!-- psc-table: other.json -->\n<!-- end of psc-table -->\n")
  with pytest.raises(ValueError, match="no record of a claim"):
    page.rendered(str(tmp_path / "p.md"))
