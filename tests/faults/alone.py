"""Faults in a process of their own: limits of time and memory, and hooks, are of a process."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def run(command: str, count: int, seed: int = 0) -> dict:
  """The figures of `python tests/faults COMMAND`."""
  env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
  asked = [sys.executable, ROOT / "tests/faults", command, f"--count={count}", f"--seed={seed}"]
  done = subprocess.run(asked, env=env, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])
