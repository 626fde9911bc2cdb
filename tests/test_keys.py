"""The listing of a config's keys."""

import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

from rope_jax import config, keys, rope, search
from rope_jax.evals.entries import ENTRIES


@pytest.fixture(scope="module")
def documented():
  return keys.documented()


def test_every_key_is_listed_with_its_default(documented):
  c = config.base()
  for name, entry in ENTRIES.items():
    c.evals[name] = entry()
  leaves = dict(keys._leaves(c))
  assert {key: value for key, (value, _) in documented.items()} == leaves and len(leaves) > 200


@pytest.mark.parametrize("path", ["rope_jax/config.py", "rope_jax/evals/entries.py"])
def test_no_comment_beside_a_default_is_lost(documented, path):
  source = (ROOT / path).read_text()
  if path.endswith("config.py"):  # `base` alone is about keys
    source = source[source.index("def base(") : source.index("def comparison(")]
  said = " ".join(" ".join(text.split()) for _, text in documented.values())
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  comments = [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT]
  assert len(comments) > 30
  for comment in comments:
    if comment not in said:
      assert "entries are added by name" in comment, comment


@pytest.mark.parametrize("block, methods", [("rope", rope.SCALINGS), ("search", search.METHODS)])
def test_what_a_docstring_says_of_an_option_is_said_of_its_key(documented, block, methods):
  found = 0
  for name, method in methods.items():
    for option in re.findall(r"^ {4}(\w+): ", method.__doc__, re.M):
      if f"{block}.{name}.{option}" in documented:
        found += 1
        _, text = documented[f"{block}.{name}.{option}"]
        first = re.search(rf"^ {{4}}{option}: (.+)$", method.__doc__, re.M)[1]
        assert first in text or first.startswith("as in `"), (name, option)
        assert text and "as in `" not in text
  assert found > 5


def test_what_is_said_of_another_method_is_said_here(documented):
  for option in ("ramp", "beta_fast", "truncate"):
    said = {documented[f"rope.{name}.{option}"][1] for name in
            ("ntk_by_parts", "yarn", "dynamic_yarn")}  # fmt: skip
    assert len(said) == 1 and said != {""}


def test_a_prefix_chooses_and_an_unknown_one_is_an_error(capsys):
  for prefix in ("train.b", "--config.train.b"):
    keys.main([prefix])
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith(" ")]
    assert lines == ["train.b1 = 0.9", "train.b2 = 0.999", "train.batch_size = 8"]
  keys.main(["train.b1", "rope.theta"])
  assert capsys.readouterr().out.startswith("rope.theta = 10000.0\n")
  command = [sys.executable, "-m", "rope_jax.keys", "trian."]
  wrong = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert wrong.returncode == 1 and wrong.stderr.startswith("error: no key begins with 'trian.'")
