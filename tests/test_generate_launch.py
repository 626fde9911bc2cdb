"""Generation as users and evaluations meet it: prompts of any number, runs, the command."""

import subprocess
import sys

import numpy as np
import pytest
import tiny
from conftest import ROOT

from rope_jax import config
from rope_jax.train import loop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  base = tmp_path_factory.mktemp("generate")
  c = tiny.run_config(tiny.text_folder(base / "text"), steps=3)
  c.evals = config.ConfigDict()
  loop.train(c, str(base / "run"))
  return c, str(base / "run")


def test_any_number_of_prompts_in_batches(run):
  c, workdir = run
  prompts = [np.arange(65, 65 + n, dtype=np.int32) for n in (3, 20, 7, 11, 5)]
  with loop._opened(c, workdir, 2) as (variables, subject_of, _):
    subject = subject_of(variables)
    alone = [subject.generate([p], 6)[0] for p in prompts]
    found = subject.generate(prompts, 6, batch_size=2, what="test")
    assert all(x.dtype == np.int32 and x.ndim == 1 for x in found)
    np.testing.assert_array_equal(np.stack(found), np.stack(alone))
    assert subject.generate([], 6) == []
    with pytest.raises(ValueError, match="config.rope.context=64.*70 tokens"):
      subject.generate(prompts, 50)


def test_the_text_of_a_trained_run_differs_from_that_of_an_untrained_one(run, tmp_path):
  c, workdir = run
  options = dict(prompts=["abc", "de"], max_new_tokens=12)
  first = loop.generate(c, workdir, **options)
  assert len(first) == 2 and first != loop.generate(c, str(tmp_path / "none"), **options)


def launch(*args):
  script = ROOT / "launch/generate.py"
  command = [sys.executable, script, "--config=configs/smollm2_16k.py", *args]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
  "args, message",
  [
    ([], "--prompt"),
    (["--prompt_file=nowhere.txt"], "--prompt_file=nowhere.txt: no such file"),
    (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens"),
    (["--prompt=a", "--top_p=0"], "--top_p=0"),
    (["--prompt=a", "--config.generate.chunk=100"], "config.generate.chunk=100"),
    (["--prompt=a", "--config.generate.on_change=x"], "config.generate.on_change='x'"),
  ],
)
def test_bad_input_is_one_line(args, message):
  found = launch(*args)
  assert found.returncode == 2 and message in found.stderr
  assert len(found.stderr.strip().splitlines()) == 1
