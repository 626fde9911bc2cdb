"""What the documentation shows is run, and what it lists is there."""

import re

import pytest
import tiny
from conftest import ROOT

from rope_jax import config, presets, rope, search
from rope_jax.data import POSITIONS
from rope_jax.train import loop

METHODS = (ROOT / "docs" / "methods.md").read_text()


def test_every_method_has_its_row():
  rows = set(re.findall(r"^\| `(\w+)` \|", METHODS, re.M))
  assert rows - {"resonance"} >= set(rope.SCALINGS) - {"none"}
  assert set(POSITIONS) <= rows
  for phase in ("psc", "psc_rotation"):
    assert f"| phase `{phase}` |" in METHODS


def test_every_search_has_its_row():
  text = (ROOT / "docs" / "search.md").read_text()
  assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) >= set(search.METHODS)


def test_every_config_has_its_row():
  text = (ROOT / "README.md").read_text()
  for path in (ROOT / "configs").glob("*.py"):
    assert f"`{path.name}`" in text, path.name


def test_every_config_line_sets_a_key():
  lines = re.findall(r"`((?:rope|data)\.[\w.]+)=([^`]+)`", METHODS)
  assert len(lines) > 25
  for key, value in lines:
    block = config.base()
    *parents, leaf = key.split(".")
    for parent in parents:
      block = block[parent]
    assert leaf in block, key
    if block[leaf] is not None and not isinstance(block[leaf], str | tuple):
      block[leaf] = type(block[leaf])(value)


@pytest.mark.slow
def test_the_notebook_cell_of_the_readme_defines_trains_and_evaluates(tmp_path, monkeypatch):
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
  (cell,) = [b for b in blocks if "SCALINGS[" in b]
  definition = cell[cell.index("def squeeze") : cell.index("c = presets")]
  assert len([line for line in definition.splitlines() if line.strip()]) <= 10

  monkeypatch.chdir(tmp_path)
  folder = tiny.text_folder(tmp_path / "text")

  def small(make):
    def made(*args):
      c = make(*args)
      c.data.source = folder
      c.model.update(num_layers=1, block_q=64, block_k=64)
      c.rope.context = c.rope.context // 4 if c.init_from else c.rope.context
      c.train.update(steps=2, batch_size=2, warmup_steps=0, log_every=1)
      if c.init_from:
        c.evals.perplexity.update(lengths=(128, 256), num_samples=2, batch_size=2)
      return c

    return made

  loop.train(small(presets.tiny)(), str(tmp_path / "runs" / "quickstart" / "pretrain"))
  monkeypatch.setattr(presets, "tiny_adapted", small(presets.tiny_adapted))
  monkeypatch.setitem(rope.SCALINGS, "squeeze", None)  # taken out again after the test
  names = {}
  exec(cell, names)
  assert set(names["results"]["perplexity"]) == {"128", "256"}
  assert names["c"].rope.squeeze.power == 2.0
  rows = (tmp_path / "runs" / "squeeze" / "rope.json").read_text()
  assert '"squeeze"' in rows and (tmp_path / "runs" / "squeeze" / "wavelengths.png").exists()
