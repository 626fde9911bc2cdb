"""Runs the evaluations of a config on the newest checkpoint of a workdir.

  python launch/eval.py --config=configs/smollm2_16k.py:scaling=yarn --workdir=DIR

Where the workdir holds no run, the model of config.init_from is evaluated as it is. Tables on the
screen, DIR/results.json for programs.
"""

import os

import cli
from absl import flags

WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run; default runs/CONFIG.")


def main(c, config_name):
  from rope_jax import config as config_lib
  from rope_jax import validate

  workdir = WORKDIR.value or os.path.join("runs", config_name)
  runs = config_lib.runs(c)
  for name, run in runs.items():
    cli.checked(name, validate.validate, run)

  from rope_jax import report
  from rope_jax.train import loop

  results = {
    name: cli.checked(name, loop.evaluate, run, cli.directory(workdir, name))
    for name, run in runs.items()
  }
  cli.write_results(results, workdir)
  print(f"\n{report.table(results)}\n\n{os.path.join(workdir, 'results.json')}")


if __name__ == "__main__":
  cli.run(main)
