"""Runs the evaluations of a config on the newest checkpoint of a workdir, and trains nothing.

  python launch/eval.py --config=configs/psc_64k.py --workdir=runs/psc
  python launch/eval.py --config=configs/smollm2_16k.py:scaling=yarn,phase=none --workdir=runs/yarn

Where the workdir holds no run, the model of config.init_from is evaluated as it is, under the rope
of the config. Which evaluations: config.evals, docs/evaluation.md. Prints tables; WORKDIR gets
results.json and figures, in place of those of an earlier evaluation or of training (whose command
makes those again). Exit codes: docs/reliability.md.
"""

import cli

workdir_of, REPORT = cli.define_workdir(), cli.define_report()
PROFILE = cli.define_profile()


def main(c, config_name):
  workdir, runs = workdir_of(config_name), cli.validated_runs(c)
  runs = cli.searched(runs, workdir)

  from rope_jax.train import loop  # after the checks: this is slow to import

  results = {
    name: cli.checked(name, loop.evaluate, run, cli.directory(workdir, name), PROFILE.value, True)
    for name, run in runs.items()
  }
  if cli.is_main():
    cli.finish(results, runs, workdir, REPORT.value)
  for name, run in runs.items():
    loop.forget(run, cli.directory(workdir, name), trained=False)


if __name__ == "__main__":
  cli.run(main)
