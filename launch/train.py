"""Trains, evaluates, checkpoints; resumes if the workdir holds a run.

  python launch/train.py --config=configs/psc_64k.py --workdir=DIR

Every key of the config can be set: --config.train.steps=100 --config.rope.scaling=pi
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

  from rope_jax import plots, report
  from rope_jax.train import loop

  results = {}
  for name, run in runs.items():
    if name:
      print(f"\n== {name}", flush=True)
    results[name] = cli.checked(name, loop.train, run, cli.directory(workdir, name))
  print("\n" + report.table(results))
  curves = {k: v["perplexity"] for k, v in results.items() if "perplexity" in v}
  if curves:
    path = os.path.join(workdir, "perplexity.png")
    plots.perplexity(curves, path, original_context=run.rope.original_context)
    cli.write_results(results, workdir)
    print(f"\n{os.path.join(workdir, 'results.json')}\n{path}")


if __name__ == "__main__":
  cli.run(main)
