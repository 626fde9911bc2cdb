"""Several processes on loopback are one run: the same numbers, the same files."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from conftest import ROOT

from rope_jax import config
from rope_jax.train import multihost, sharding, state

CONFIG = """
import tiny
def get_config():
  c = tiny.run_config({folder!r}, steps=5)
  c.model.vocab_size = 264
  c.lora.rank = 4
  c.rope.phase = "psc"
  c.checkpoint.every = 2
  c.checkpoint.keep = 5
  c.train.log_every = 1
  c.mesh.update(data=2, fsdp=2, context=2)
  c.evals.perplexity.every_steps = 3
  return c
"""


def start(path, workdir, processes, *flags, script="train"):
  """Starts a script of launch/ on eight devices in all, and gives the processes."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  started = []
  for i in range(processes):
    env = dict(
      os.environ,
      JAX_PLATFORMS="cpu",
      XLA_FLAGS=f"--xla_force_host_platform_device_count={8 // processes}",
      PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    )
    if processes > 1:
      env |= dict(
        JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(processes), JAX_PROCESS_ID=str(i)
      )
    command = [sys.executable, f"launch/{script}.py", f"--config={path}", f"--workdir={workdir}"]
    started.append(
      subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      )
    )  # fmt: skip
  return started


def finish(processes):
  """The output of each, all of which must succeed."""
  outputs = [p.communicate(timeout=300)[0] for p in processes]
  for p, output in zip(processes, outputs):
    assert p.returncode == 0, output
  return outputs


def rows(workdir):
  """Rows of metrics.jsonl without what the clock has a part in."""
  with open(os.path.join(workdir, "metrics.jsonl")) as f:
    lines = [json.loads(line) for line in f]
  return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]


def trained(workdir):
  mesh = sharding.make_mesh(config.base().mesh, 1)
  return jax.tree.map(np.asarray, state.run_variables(str(workdir), mesh))


def assert_same(a, b):
  got, expected = trained(a), trained(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, expected)
  for ours, theirs in zip(rows(a), rows(b), strict=True):
    assert ours.keys() == theirs.keys()
    for key in ours:
      np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, err_msg=key)


@pytest.mark.long
def test_two_processes_are_one_and_what_two_have_saved_one_restores(tmp_path, monkeypatch):
  path = tmp_path / "experiment.py"
  path.write_text(CONFIG.format(folder=tiny.text_folder(tmp_path / "text")))
  one, two = tmp_path / "one", tmp_path / "two"
  finish(start(path, one, 1))
  monkeypatch.setenv("ROPE_JAX_DATA", str(tmp_path / "cold"))  # both prepare it at once
  first, second = finish(start(path, two, 2))
  assert "step 5/5" in first and "step" not in second  # one of them talks
  assert_same(two, one)

  # What remains of a run that was stopped after step 2, on another mesh and in one process.
  for step in ("4", "5"):
    shutil.rmtree(two / "checkpoints" / step)
  (two / "results.json").unlink()
  (output,) = finish(
    start(
      path,
      two,
      1,
      "--config.mesh.fsdp=1",
      "--config.mesh.tensor=2",
      "--config.model.context_parallel=ring",
    )
  )
  assert "continued after step 2" in output and "tensor 2" in output
  assert_same(two, one)
  results = [json.loads((d / "results.json").read_text())["perplexity"] for d in (one, two)]
  for length in results[0]:
    np.testing.assert_allclose(*(r[length]["ppl"] for r in results), rtol=1e-5)

  # Evaluated by two, with rows too few for their devices.
  mesh = ["--config.mesh.data=-1", "--config.mesh.fsdp=1"]
  first, second = finish(start(path, two, 2, *mesh, script="eval"))
  assert "perplexity" in first and "perplexity" not in second
  again = json.loads((two / "results.json").read_text())["perplexity"]
  for length in again:
    np.testing.assert_allclose(again[length]["ppl"], results[0][length]["ppl"], rtol=1e-5)


@pytest.mark.long
def test_two_processes_continue_a_text_as_one_does(tmp_path):
  path = tmp_path / "experiment.py"
  path.write_text(CONFIG.format(folder="stdlib"))
  asked = ["--prompt=abcdefghij", "--prompt=xyz", "--max_new_tokens=20", "--temperature=1"]
  (alone,) = finish(start(path, tmp_path / "one", 1, *asked, script="generate"))
  first, second = finish(start(path, tmp_path / "two", 2, *asked, script="generate"))
  answers = alone[alone.index("\nabcdefghij|") :]
  assert answers in first and "abcdefghij" not in second


@pytest.mark.long
def test_a_notice_to_one_process_stops_all_at_one_step_with_all_saved(tmp_path):
  path, workdir = tmp_path / "experiment.py", tmp_path / "run"
  path.write_text(CONFIG.format(folder=tiny.text_folder(tmp_path / "text")))
  flags = ["--config.train.steps=100000", "--config.checkpoint.every=100000"]
  flags += ["--config.evals.perplexity.every_steps=0"]
  processes = start(path, workdir, 2, *flags)
  metrics = workdir / "metrics.jsonl"
  while all(p.poll() is None for p in processes):
    if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
      processes[1].send_signal(signal.SIGTERM)  # jax hands it on
      break
    time.sleep(0.05)
  outputs = [p.communicate(timeout=300)[0] for p in processes]
  assert [p.returncode for p in processes] == [75, 75], outputs
  said = {re.search("saved after step (\\d+) in ", output)[1] for output in outputs}
  assert len(said) == 1 and (workdir / "checkpoints" / said.pop()).is_dir()


def test_an_error_is_the_same_in_every_process(tmp_path):
  path = tmp_path / "experiment.py"
  path.write_text(CONFIG.format(folder=tiny.text_folder(tmp_path / "text", documents=1)))
  for p in start(path, tmp_path / "run", 2, "--config.mesh.context=3"):
    assert p.wait(timeout=120) == 2
    assert "config.mesh" in p.stdout.read()
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "given", [dict(address="localhost:1"), dict(address="localhost:1", number="2", process="2")]
)
def test_half_an_environment_is_refused(monkeypatch, given):
  names = dict(
    address="JAX_COORDINATOR_ADDRESS", number="JAX_NUM_PROCESSES", process="JAX_PROCESS_ID"
  )
  for key, value in given.items():
    monkeypatch.setenv(names[key], value)
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES"):
    multihost.initialize()
