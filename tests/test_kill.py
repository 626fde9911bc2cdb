"""A run killed by SIGKILL, as a user would meet it: the command line, twice."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import tiny
from conftest import ROOT

from rope_jax import config
from rope_jax.train import sharding, state

CONFIG = '''"""For the test of kills."""

from rope_jax import config


def get_config():
  c = config.base()
  c.tokenizer = "byte"
  c.data.source = {folder!r}
  c.model.update(num_layers=2, d_model=32, d_ff=64)
  c.rope.update(original_context=16, context=64, scaling="yarn", phase="psc")
  c.lora.rank = 4
  c.train.update(steps=300, batch_size=4, learning_rate=3e-3, log_every=1, trainable="adapters")
  c.checkpoint.every = 20
  c.evals.perplexity = config.perplexity(lengths=(32, 64), protocol="truncate")
  return c
'''


def start(path, workdir):
  return subprocess.Popen(
    [sys.executable, ROOT / "launch/train.py", f"--config={path}", f"--workdir={workdir}"],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  output, _ = process.communicate(timeout=600)
  assert process.returncode == 0, output
  return output


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_ends_with_the_same_parameters(tmp_path):
  path = tmp_path / "kill.py"
  path.write_text(CONFIG.format(folder=tiny.text_folder(tmp_path / "text")))
  finish(start(path, tmp_path / "whole"))
  cut = tmp_path / "cut"
  for after in (25, 110):  # kills in the middle of training, wherever that is
    process = start(path, cut)
    while process.poll() is None:
      metrics = cut / "metrics.jsonl"
      if metrics.exists() and len(metrics.read_text().splitlines()) > after:
        process.send_signal(signal.SIGKILL)
        break
      time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
  output = finish(start(path, cut))
  assert "continued after step" in output and "perplexity at" in output

  mesh = sharding.make_mesh(config.base().mesh, 1)
  whole, resumed = (state.run_variables(str(d), mesh) for d in (tmp_path / "whole", cut))
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  assert (tmp_path / "whole/results.json").read_text() == (cut / "results.json").read_text()
  losses = [
    [(r["step"], r["loss"]) for r in rows(d) if "loss" in r] for d in (tmp_path / "whole", cut)
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 300
