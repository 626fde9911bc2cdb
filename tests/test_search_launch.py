"""launch/search.py as users meet it: a comparison, kills, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
from conftest import ROOT
from test_multihost import finish, start

CONFIG = """
import tiny
from rope_jax import config
def get_config():
  runs = dict(pretrain=tiny.run_config({folder!r}, steps=3))
  for name in ("longrope", "gradient"):
    runs[name] = c = tiny.run_config({folder!r}, steps=0)
    c.init_from = "run:pretrain"
    c.rope.update(context=128, scaling="longrope")
    c.search.method = name
    c.search.fitness.num_samples = 2
    c.search.batch_size = 4
  runs["longrope"].search.longrope.update(
    population=8, generations=12, mutations=4, crossovers=4, parents=6, start_tokens=(0,))
  c.search.gradient.update(steps=4, every=2)
  c.search.initial = "run:longrope"
  for c in runs.values():
    c.rope.original_context = 64
    c.evals.perplexity.lengths = (64,) if c is runs["pretrain"] else (64, 128)
  return config.comparison(**runs)
"""


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "experiment.py"
  path.write_text(CONFIG.format(folder=tiny.text_folder(tmp_path / "text")))
  return path


def found(workdir, name="longrope"):
  return json.loads((workdir / name / "factors.json").read_text())


@pytest.mark.long
def test_searches_of_a_comparison_that_are_killed_end_the_same(path, tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  (output,) = finish(start(path, whole, 1, "--report", script="search"))
  assert "perplexity at" in output and "gradient" in output
  assert set(json.loads((whole / "results.json").read_text())) == {
    "pretrain", "longrope", "gradient"
  }  # fmt: skip
  for name in ("factors.json", "factors.png", "fitness.png", "search.jsonl", "results.json"):
    assert (whole / "longrope" / name).exists()

  for lines in (3, 9):  # in some generation, wherever that is
    (process,) = start(path, cut, 1, script="search")
    journal = cut / "longrope/search.jsonl"
    while process.poll() is None:
      if journal.exists() and len(journal.read_text().splitlines()) > lines:
        process.send_signal(signal.SIGKILL)
        break
      time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
  finish(start(path, cut, 1, script="search"))
  for name in ("longrope", "gradient"):
    assert found(cut, name) == found(whole, name)

  # What was found is used by the other commands, from elsewhere too.
  (output,) = finish(start(path, os.path.relpath(cut, ROOT), 1, script="eval"))
  assert "longrope x2" in output


@pytest.mark.parametrize(
  "args, message",
  [
    (["--config=configs/quickstart.py"], "names no method"),
    (["--config=configs/search_tiny.py", "--config.runs.gradient.search.gradient.steps=0"],
     "config.runs.gradient.search.gradient.steps=0"),
    (["--config=configs/search_tiny.py", "--config.runs.gradient.search.initial=run:typo"],
     "config.runs.gradient.search.initial='run:typo'"),
  ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, args, message):
  done = subprocess.run(
    [sys.executable, ROOT / "launch/search.py", *args, f"--workdir={tmp_path}/run"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.long
def test_throughput_is_measured_both_ways(path, tmp_path):
  finish(start(path, tmp_path / "run", 1, "--config.order=('pretrain',)", script="train"))
  (output,) = finish(start(path, tmp_path / "run", 1, "--throughput=30", script="search"))
  ratio = float(output.split("ratio")[1].split()[0])
  assert output.count("candidates/min") == 2 and ratio > 0
  assert not (tmp_path / "run/longrope").exists()
