"""Entries of config.evals, and what tables make of results of any type."""

import pytest

from rope_jax import config, report
from rope_jax.config import ENTRIES


def test_a_plain_dict_is_completed():
  c = config.base()
  c.evals.short = dict(type="passkey", lengths=(128, 256), every_steps=50)
  c.evals.whole = config.perplexity(stride=64)
  (run,) = config.runs(c).values()
  assert run.evals.short == config.passkey(lengths=(128, 256), every_steps=50)
  assert run.evals.whole == config.perplexity(stride=64)
  both = config.comparison(a=c)
  both.runs.a.evals.short = dict(type="ruler")
  assert config.runs(both)["a"].evals.short == config.ruler()


@pytest.mark.parametrize(
  "entry, message",
  [
    (dict(lengths=(128,)), "evals.mine.type=None.*'passkey'"),
    (dict(type="paskey"), "evals.mine.type='paskey'"),
    (dict(type="passkey", lenghts=(128,)), "evals.mine.lenghts.*lengths"),
    (dict(type="passkey", lengths=128), "evals.mine:.*lengths"),
    (config.passkey().to_dict() | dict(num_samples="5"), "evals.mine:.*num_samples"),
  ],
)
def test_a_plain_dict_with_another_type_or_key_is_refused(entry, message):
  c = config.base()
  c.evals.mine = entry
  with pytest.raises(ValueError, match=message):
    config.runs(c)


def test_every_type_of_entry_is_made_by_the_function_of_its_name():
  for name, make in ENTRIES.items():
    assert make().type == name and getattr(config, name) is make
    with pytest.raises((AttributeError, KeyError)):
      make(no_such_key=1)


def column(value, **more):
  return dict(metric="score", score=value, threshold=0.8, **more)


def test_a_length_holds_while_all_before_it_do():
  def reach(*values):
    return report.reach({str(2**i): column(x) for i, x in enumerate(values)})

  assert reach(0.9, 0.8, 0.7) == 2 and reach(0.7, 0.9) == 0 and reach(0.9, 0.9) == 2
  assert reach(0.9, 0.1, 0.9) == 1
  assert report.reach({"16": dict(metric="ppl", ppl=3.0)}) is None


def test_tables_show_tasks_intervals_and_how_far_a_run_holds():
  parts = dict(tasks=dict(vt=dict(metric="score", score=0.5, low=0.25, high=0.75)))
  results = dict(
    a=dict(ruler={"4096": column(0.9), "16384": column(0.5, **parts)}),
    b=dict(ruler={"4096": column(0.1)}, perplexity={"4096": dict(metric="ppl", ppl=9, stderr=1)}),
  )
  first, second = (t.splitlines() for t in report.table(results).split("\n\n"))
  assert first[0].split() == ["ruler:", "score", "at", "4,096", "16,384", "holds", "to"]
  assert [line.split() for line in first[2:]] == [
    ["a", "0.90", "0.50", "4,096"],
    ["a", "vt", "0.50", "[0.25,", "0.75]"],
    ["b", "0.10", "-"],
  ]
  assert second[0].split() == ["perplexity", "at", "4,096"]
  assert second[2].split() == ["b", "9.000", "±", "1.000"]
  assert report.brief("x", {"4096": column(0.5)}) == "x: 4,096: 0.50"


def test_a_run_of_another_version_is_refused_by_name(tmp_path):
  c = config.base()
  c.evals.perplexity = config.perplexity()
  config.write(c, str(tmp_path))
  path = tmp_path / "run.json"
  assert config.read(str(tmp_path)).to_dict() == c.to_dict()
  path.write_text(path.read_text().replace("every_steps", "every"))
  with pytest.raises(
    ValueError, match="run.json: the evaluation perplexity.*another version.*every"
  ):
    config.read(str(tmp_path))
