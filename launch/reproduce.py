"""Reproduces a published claim: the paper's number beside ours.

  python launch/reproduce.py dprope-table3

Without a claim, lists those that there are.
"""

import sys

from absl import app


def main(argv):
  from rope_jax.claims import CLAIMS

  if len(argv) == 1:
    print("claims:")
    for name, function in CLAIMS.items():
      print(f"  {name:20}{function.__doc__.splitlines()[0]}")
    return
  for name in argv[1:]:
    if name not in CLAIMS:
      print(f"error: unknown claim {name!r}; known: {', '.join(CLAIMS)}", file=sys.stderr)
      sys.exit(2)
  for name in argv[1:]:
    print(f"{name}: {' '.join(CLAIMS[name].__doc__.split())}\n\n{CLAIMS[name]()}\n")


if __name__ == "__main__":
  app.run(main)
