"""Reproduces a published claim: the paper's number beside ours, with controls, seeds and a verdict.

  python launch/reproduce.py                                 lists the claims
  python launch/reproduce.py psc-table                       preset mini: two CPU cores will do
  python launch/reproduce.py psc-table --preset=paper --init_from=DIR
  python launch/reproduce.py --record=docs/results/psc-table.json

Runs live in WORKDIR/PRESET, a directory each, and claims share what they have in common; what is
finished is not run again, so the same command goes on where it was cut off. The tables are printed,
and WORKDIR/PRESET/CLAIM.json has all numbers by run. --only=PATTERN makes a part of the runs (and
what they start from), e.g. --only='psc_s0_*', so that processes can share a workdir; machines share
the work by --join=FILE, a CLAIM.json from elsewhere. docs/results.md has what came out here.
"""

import os

import cli
from absl import flags

PRESET = flags.DEFINE_enum(
  "preset", "mini", ["mini", "paper"], "A small model on two cores, or the paper's own."
)
WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "Directory of all runs.")
ONLY = flags.DEFINE_string("only", "*", "Pattern of the names of the runs to make.")
INIT_FROM = flags.DEFINE_string("init_from", "", "Weights of the base model, for --preset=paper.")
RECORD = flags.DEFINE_string("record", "", "Print the tables of such a file, and run nothing.")
JOIN = flags.DEFINE_list("join", [], "Records from elsewhere, whose runs are not made again.")
FIGURE = flags.DEFINE_string("figure", "", "With --record: the PNG or SVG to draw it to.")
PAGE = flags.DEFINE_string("page", "", "Make the tables of a Markdown page anew from its records.")


def main(argv):
  from rope_jax.claims import CLAIMS, page, runner

  for name in argv[1:]:
    if name not in CLAIMS:
      cli.fail(f"unknown claim {name!r}; known: {', '.join(CLAIMS)}")
  if RECORD.value:
    value = page.read(RECORD.value)
    print(runner.report(value))
    if FIGURE.value and not runner.figure(value, FIGURE.value):
      cli.fail(f"--figure={FIGURE.value}: {value['claim']} has none")
  elif PAGE.value:
    page.write(PAGE.value)
  elif len(argv) == 1:
    print("claims:")
    for name, claim in CLAIMS.items():
      print(f"  {name:18}{claim.__doc__.splitlines()[0]}")
  workdir = os.path.join(WORKDIR.value, PRESET.value)
  for name in argv[1:]:
    print(CLAIMS[name].__doc__)
    others = [page.read(path, "join") for path in JOIN.value]
    value = runner.run(name, PRESET.value, workdir, ONLY.value, INIT_FROM.value, others)
    print("\n" + runner.report(value))
    path = os.path.join(workdir, name)
    written = [f"{path}.json"] if value["runs"] else []
    written += [f"{path}.png"] if runner.figure(value, f"{path}.png") else []
    print("".join(f"\n{path}" for path in written))


if __name__ == "__main__":
  cli.start(main)
