"""Searches for the factors of LongRoPE, then trains and evaluates with them.

  python launch/search.py --config=configs/search_tiny.py --workdir=DIR

Each run whose config.search.method names a method gets factors.json, figures of the factors and of
the fitness, and search.jsonl, all that was computed: the same command goes on where it was cut off.
They are in WORKDIR, in a comparison in WORKDIR/NAME. Then the run is trained (if train.steps says
so) and evaluated with these factors, as by launch/train.py. --config.rope.longrope.factors=FILE
reads them in any other config. docs/search.md has the methods.
"""

import cli
from absl import flags

workdir_of, REPORT = cli.define_workdir(), cli.define_report()
THROUGHPUT = flags.DEFINE_integer(
  "throughput",
  0,
  "Search nothing; time so many candidates of the first run that searches, evaluated together and "
  "one at a time with a fresh compile each.",
  lower_bound=0,
)


def main(c, config_name):
  workdir, runs = workdir_of(config_name), cli.validated_runs(c)
  searching = [name for name, run in runs.items() if run.search.method]
  if not searching:
    cli.fail("config.search.method='': names no method; or is it launch/train.py that you want?")

  from rope_jax.search import run as search_lib  # after the checks: these are slow to import
  from rope_jax.search import settings, throughput
  from rope_jax.train import loop

  if THROUGHPUT.value:
    name = searching[0]
    directory = cli.directory(workdir, name)
    print(cli.checked(name, throughput.measure, runs[name], directory, THROUGHPUT.value))
    return
  results, used, searches = {}, {}, {}
  for name, run in runs.items():
    directory = cli.directory(workdir, name)
    if name and cli.is_main():
      print(f"\n== {name}", flush=True)
    if run.search.method:
      searches[name] = cli.checked(name, search_lib.search, run, directory)
      if cli.is_main():
        print(search_lib.summary(searches[name], directory), flush=True)
    used[name] = cli.checked(name, settings.searched, run, directory)
    results[name] = cli.checked(name, loop.train, used[name], directory, False, True)
  if cli.is_main():
    print("\n" + search_lib.compare(searches, workdir))
    cli.finish(results, used, workdir, REPORT.value)
  for name, run in used.items():
    loop.forget(run, cli.directory(workdir, name), trained=True)


if __name__ == "__main__":
  cli.run(main)
