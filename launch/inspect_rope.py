"""Prints the resolved rope of a config: frequencies, wavelengths, attention scale.

python launch/inspect_rope.py --config=configs/psc_64k.py [--json] [--seq_len=N]
"""

import json

import cli
from absl import flags

JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")
SEQ_LEN = flags.DEFINE_integer(
  "seq_len", None, "Tokens of the sequence, for methods that depend on it.", lower_bound=1
)


def main(c, config_name):
  del config_name
  from rope_jax import config as config_lib
  from rope_jax import report, resolve

  runs = config_lib.runs(c)
  described = {
    name: cli.checked(name, resolve.describe, run, SEQ_LEN.value) for name, run in runs.items()
  }
  if JSON.value:
    print(json.dumps(described.get("", described), indent=1))
    return
  for name, run in runs.items():
    print(f"{name}: " * bool(name) + report.rope_line(run))
    print(f"{'pair':>5} {'inv_freq (rad/token)':>22} {'wavelength (tokens)':>22} {'turns':>12}")
    r = described[name]
    for i, (f, w) in enumerate(zip(r["inv_freq"], r["wavelengths"])):
      print(f"{i:>5} {f:>22.9g} {w:>22,.3f} {r['original_context'] / w:>12.3g}")


if __name__ == "__main__":
  cli.run(main)
