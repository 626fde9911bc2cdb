"""How claims are run: again, in parts, after a kill, elsewhere; and their page."""

import json

import pytest
import tiny
from conftest import ROOT

from rope_jax import config, presets
from rope_jax.claims import CLAIMS, page, record, runner

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
  first = runner.run(runner.plan("toy", "mini", str(toy / "a")))
  second = runner.run(runner.plan("toy", "mini", str(toy / "b")))
  assert first == second and list(first["runs"]) == ["toy_base", "toy_yarn"]
  assert record.report(first).startswith("1 runs")  # the base is not evaluated
  assert (toy / "a" / "toy.json").read_bytes() == (toy / "b" / "toy.json").read_bytes()
  assert record.read(str(toy / "a" / "toy.json")) == json.loads(json.dumps(first))


@pytest.mark.slow
def test_finished_runs_are_not_run_again_and_others_are(toy, monkeypatch):
  runner.run(runner.plan("toy", "mini", str(toy), only="toy_base"))
  stored = json.loads((toy / "toy.json").read_text())
  assert list(stored["runs"]) == ["toy_base"] and "NOT COMPLETE" in record.report(stored)
  ran, execute = [], runner.execute
  monkeypatch.setattr(
    runner, "execute", lambda name, *args: (ran.append(name), execute(name, *args))
  )
  whole = runner.run(runner.plan("toy", "mini", str(toy)))
  assert ran == ["toy_yarn"] and "NOT COMPLETE" not in record.report(whole)
  runner.run(runner.plan("toy", "mini", str(toy)))
  assert ran == ["toy_yarn"]


@pytest.mark.slow
def test_a_kill_before_a_changed_evaluation_leaves_no_old_values(toy, monkeypatch):
  first = runner.run(runner.plan("toy", "mini", str(toy)))
  toy_runs = _Toy.runs

  def changed(preset, init_from):
    found = toy_runs(preset, init_from)
    found["toy_yarn"].evals.perplexity.num_samples = 4
    return found

  monkeypatch.setattr(_Toy, "runs", staticmethod(changed))

  def killed(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as m:
    m.setattr("rope_jax.evals.evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
      runner.run(runner.plan("toy", "mini", str(toy)))
  found = runner.runs("toy", "mini")
  assert list(record.collect("toy", "mini", found, str(toy))["runs"]) == ["toy_base"]
  second = runner.run(runner.plan("toy", "mini", str(toy)))
  tokens = [
    r["runs"]["toy_yarn"]["results"]["perplexity"]["256"]["tokens"] for r in (first, second)
  ]
  assert tokens[0] == 2 * tokens[1]


@pytest.mark.slow
def test_runs_of_other_versions_are_not_taken_for_ones_of_these(toy, monkeypatch):
  runner.run(runner.plan("toy", "mini", str(toy), only="toy_base"))
  other = dict(record._versions(), jax="0.0.1")
  monkeypatch.setattr(record, "_versions", lambda: other)
  with pytest.raises(ValueError, match="--workdir: .*toy_base was run by .*, and .* jax 0.0.1 on"):
    runner.run(runner.plan("toy", "mini", str(toy)))


@pytest.mark.slow
def test_what_another_plan_has_made_since_is_not_made_again(toy, monkeypatch):
  first, second = (runner.plan("toy", "mini", str(toy)) for _ in range(2))
  there = runner.run(first)
  monkeypatch.setattr(runner, "execute", None)
  assert second.left == ("toy_base", "toy_yarn") and runner.run(second) == there


@pytest.mark.slow
def test_a_record_from_elsewhere_is_joined_and_not_made_again(toy, monkeypatch):
  there = runner.run(runner.plan("toy", "mini", str(toy / "there")))
  monkeypatch.setattr(runner, "execute", None)
  here = runner.run(runner.plan("toy", "mini", str(toy / "here"), records=[there]))
  assert here == there
  other = dict(there, runs={n: dict(r, config="0") for n, r in there["runs"].items()})
  with pytest.raises(ValueError, match="--join: the run toy_base is of other settings"):
    runner.run(runner.plan("toy", "mini", str(toy / "here"), records=[other]))
  with pytest.raises(ValueError, match="--join: versions"):
    runner.run(runner.plan("toy", "mini", str(toy / "here"), records=[dict(there, versions={})]))


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
  for stored in (ROOT / "docs" / "results").glob("*.json"):
    assert f"results/{stored.name} -->" in text


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.json")), ids=str)
def test_a_stored_record_is_whole_and_of_the_settings_that_are_run(path):
  value = record.read(str(path))
  found = runner.runs(value["claim"], value["preset"])
  assert list(value["runs"]) == list(found) and value["of"] == len(found)
  assert {n: r["config"] for n, r in value["runs"].items()} == {
    name: record.digest(name, found) for name, c in found.items()
  }


@pytest.mark.parametrize("text, message", [
  ("<!-- psc-table: other.json -->\n<!-- end of psc -->\n", "without its end"),
  ("text\n<!-- end of psc-table -->\n", "without its section"),
  ("<!-- psc: -->\n<!-- end of psc -->\n", "without its section"),
  ("<!-- psc: other.json -->\n<!-- end of psc -->\n", "no claim"),
  (None, "No such file"),
])  # fmt: skip
def test_a_page_whose_sections_cannot_be_made_is_refused(tmp_path, text, message):
  if text is not None:
    (tmp_path / "p.md").write_text(text)
  with pytest.raises(ValueError, match=f"--page=.*{message}"):
    page.rendered(str(tmp_path / "p.md"))


@pytest.mark.parametrize("value", [
  {}, dict(claim="psc-table", runs={}),
  dict(claim="psc-table", preset="mini", of=1, versions={}, runs=dict(a=dict(results={}))),
])  # fmt: skip
def test_what_is_no_record_is_refused(tmp_path, value):
  (tmp_path / "r.json").write_text(json.dumps(value))
  with pytest.raises(ValueError, match="--join=.*no record of a claim"):
    record.read(str(tmp_path / "r.json"), "join")


def test_a_page_with_a_record_that_is_none_is_refused(tmp_path):
  (tmp_path / "other.json").write_text("{}")
  (tmp_path / "p.md").write_text("<!-- psc-table: other.json -->\n<!-- end of psc-table -->\n")
  with pytest.raises(ValueError, match="no record of a claim"):
    page.rendered(str(tmp_path / "p.md"))
