"""Trains, evaluates, checkpoints; resumes if the workdir holds a run.

  python launch/train.py --config=configs/psc_64k.py --workdir=DIR

Every key of the config can be set: --config.train.steps=100 --config.rope.scaling=pi
--report writes DIR/report.html, an HTML page of the results; --profile a trace of two steps to
DIR/profile, and where their time went to DIR/profile.txt.
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
