"""Trains, evaluates and saves a run, or each run of a comparison; goes on with what is there.

  python launch/train.py --config=configs/quickstart.py
  python launch/train.py --config=configs/psc_64k.py --config.init_from=DIR --workdir=runs/psc

Every key of the config can be set: --config.train.steps=100 --config.rope.scaling=pi. All of them,
with their defaults: python -m rope_jax.keys

Prints the resolved rope, parameters, memory, progress and a table of results. WORKDIR gets the
config, checkpoints, metrics, results.json and figures (docs/configs.md), in a comparison a
directory for each run. The same command goes on after a kill, and where it exits with 74 (the disk)
or 75 (preempted); 2 is bad input, 3 numbers that are not finite (docs/reliability.md).
"""

import cli

workdir_of, REPORT = cli.define_workdir(), cli.define_report()
PROFILE = cli.define_profile()


def main(c, config_name):
  workdir, runs = workdir_of(config_name), cli.validated_runs(c)
  runs = cli.searched(runs, workdir)

  from rope_jax.train import loop  # after the checks: this is slow to import

  results = {}
  for name, run in runs.items():
    if name and cli.is_main():
      print(f"\n== {name}", flush=True)
    results[name] = cli.checked(
      name, loop.train, run, cli.directory(workdir, name), PROFILE.value, True
    )
  if cli.is_main():
    cli.finish(results, runs, workdir, REPORT.value)
  for name, run in runs.items():
    loop.forget(run, cli.directory(workdir, name), trained=True)


if __name__ == "__main__":
  cli.run(main)
