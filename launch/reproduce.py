"""Reproduces a published claim: the paper's number beside ours, with controls, seeds and a verdict.

  python launch/reproduce.py                                 lists the claims
  python launch/reproduce.py psc-table                       preset mini: two CPU cores will do
  python launch/reproduce.py psc-table --preset=paper --init_from=DIR
  python launch/reproduce.py --record=docs/results/psc-table.json

Runs live in WORKDIR/PRESET, a directory each, and claims share what they have in common; what is
finished is not run again, so the same command goes on where it was cut off. The tables are printed,
and WORKDIR/PRESET/CLAIM.json has all numbers by run. --only=PATTERN makes a part of the runs (and
what they start from), e.g. --only='psc_s0_*': processes whose parts start from nothing in common
can share a workdir. Machines share the work by --join=FILE, a CLAIM.json from elsewhere, of the
same weights. On several hosts every one runs the same command. docs/results.md has what came out.
"""

import os

import cli
from absl import flags

PRESET = flags.DEFINE_enum(
  "preset", "mini", ["mini", "paper"], "A small model on two cores, or the paper's own."
)
WORKDIR = cli.define_workdir()
ONLY = flags.DEFINE_string("only", "*", "Pattern of the names of the runs to make.")
INIT_FROM = flags.DEFINE_string("init_from", "", "Weights of the base model, for --preset=paper.")
RECORD = flags.DEFINE_string("record", "", "Print the tables of such a file, and run nothing.")
JOIN = flags.DEFINE_list("join", [], "Records from elsewhere, whose runs are not made again.")
FIGURE = flags.DEFINE_string("figure", "", "With --record: the PNG or SVG to draw it to.")
PAGE = flags.DEFINE_string("page", "", "Make the tables of a Markdown page anew from its records.")


def main(argv):
  claims = argv[1:]
  _check_flags(claims)
  if RECORD.value:
    _show(RECORD.value)
  elif PAGE.value:
    from rope_jax.claims import page

    page.write(PAGE.value)
  elif claims:
    _run(claims, os.path.join(WORKDIR("reproduce"), PRESET.value))
  else:
    from rope_jax.claims import CLAIMS

    print("claims:")
    for name, claim in CLAIMS.items():
      print(f"  {name:18}{claim.__doc__.splitlines()[0]}")


def _check_flags(claims: list[str]) -> None:
  """Exits with 2 where a flag would do nothing."""
  if RECORD.value:
    what, used = "--record", {"record", "figure"}
  elif PAGE.value:
    what, used = "--page", {"page"}
  elif claims:
    what, used = claims[0], {"preset", "workdir", "only", "init_from", "join"}
  else:
    what, used = "no claim", set()
  if claims and what != claims[0]:
    cli.fail(f"{what} runs nothing: give it without {claims[0]}")
  ours = ("preset", "workdir", "only", "init_from", "record", "join", "figure", "page")
  for name in ours:
    if flags.FLAGS[name].present and name not in used:
      cli.fail(f"--{name}: of no use with {what}")


def _show(path: str) -> None:
  from rope_jax.claims import record

  value = record.read(path)
  print(record.report(value))
  if FIGURE.value and not record.figure(value, FIGURE.value):
    cli.fail(f"--figure={FIGURE.value}: {value['claim']} has none")


def _run(claims: list[str], workdir: str) -> None:
  from rope_jax.claims import CLAIMS, record, runner
  from rope_jax.train import multihost, preemption

  for name in claims:
    if name not in CLAIMS:
      cli.fail(f"unknown claim {name!r}; known: {', '.join(CLAIMS)}")
  others = [record.read(path, "join") for path in JOIN.value]
  for path, value in zip(JOIN.value, others):
    if value["claim"] not in claims:
      cli.fail(f"--join={path}: a record of {value['claim']}, which is not asked for")
  multihost.initialize()
  preemption.install()
  plans = [  # all, before the first run of the first
    runner.plan(
      name,
      PRESET.value,
      workdir,
      ONLY.value,
      INIT_FROM.value,
      [value for value in others if value["claim"] == name],
    )
    for name in claims
  ]
  for name, plan in zip(claims, plans):
    if cli.is_main():
      print(CLAIMS[name].__doc__)
    value = runner.run(plan)
    if cli.is_main():
      path = os.path.join(workdir, name)
      written = [f"{path}.json"] if value["of"] else []
      written += [f"{path}.png"] if record.figure(value, f"{path}.png") else []
      print("\n" + record.report(value) + "".join(f"\n{path}" for path in written))


if __name__ == "__main__":
  cli.start(main)
