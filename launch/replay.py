"""Runs again the step that a run stopped at, and shows what of it is not finite.

  python launch/replay.py runs/psc/nonfinite/120

A run stops, with exit code 3, after more than config.train.max_skipped steps in a row that are not
finite; its last line names this directory. The config is that of the run. Prints the loss, and
where it, the parameters and the gradients are not finite; writes nothing.
"""

import cli


def main(argv):
  if len(argv) != 2:
    cli.fail("expected one argument, the directory of a step: DIR/nonfinite/STEP")
  from rope_jax.train import dump, multihost

  multihost.initialize()
  found = dump.replay(argv[1])
  if not multihost.is_main():
    return
  print(f"step {found['step']}: loss {found['loss']}, gradient norm {found['grad_norm']}")
  losses = found["losses"]
  first = ", ".join(f"token {place} of row {row}" for row, place in losses["first"])
  print(f"losses that are not finite: {losses['count']:,}" + (f" ({first}, ...)" if first else ""))
  for what in ("parameters", "gradients"):
    print(f"{what} that are not finite: " + ("" if found[what] else "none"))
    for name, count in found[what].items():
      print(f"  {name}: {count:,} entries")


if __name__ == "__main__":
  cli.start(main)
