"""Prints the resolved rope of a config: frequencies, wavelengths, attention scale; draws figures.

  python launch/inspect_rope.py --config=configs/psc_64k.py
  python launch/inspect_rope.py --config=configs/psc_64k.py --json --seq_len=8192
  python launch/inspect_rope.py --config=configs/psc_64k.py --plot=figures --compare=none,pi,dprope

Nothing is trained, and no weights are read. --plot writes wavelengths, angle histograms,
disturbance and score decay; --compare draws other methods beside the config's own, with their
default options. docs/methods.md has the methods.
"""

import copy
import json
import os

import cli
import numpy as np
from absl import flags

JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")
SEQ_LEN = flags.DEFINE_integer(
  "seq_len",
  None,
  "Tokens of the sequence, for methods that depend on it; rope.context if not given.",
  lower_bound=1,
  upper_bound=2**31 - 1,  # rope_jax.rope.limits.MOST_TOKENS, which takes seconds to import
)
PLOT = flags.DEFINE_string("plot", "", "Directory to write figures to.")
COMPARE = flags.DEFINE_list(
  "compare", [], "With --plot: other names of config.rope.scaling, e.g. none,pi,yarn."
)
FORMAT = flags.DEFINE_enum("format", "png", ["png", "svg"], "With --plot: of the figures.")


def main(c, config_name):
  del config_name
  cli.check_directory("plot", PLOT.value)
  from rope_jax import config as config_lib
  from rope_jax import report, resolve

  runs = config_lib.runs(c)
  described = {
    name: cli.checked(name, resolve.describe, run, SEQ_LEN.value) for name, run in runs.items()
  }
  for name, run in runs.items():
    described[name]["disturbance"] = resolve.disturbance(run, SEQ_LEN.value)
  if COMPARE.value and not PLOT.value:
    cli.fail("--compare is for figures: give --plot=DIR, too")
  figures = _plot(runs) if PLOT.value else []
  if JSON.value:
    print(json.dumps(described.get("", described), indent=1, allow_nan=False))
    return
  for name, run in runs.items():
    r = described[name]
    print(f"{name}: " * bool(name) + report.rope_line(run, SEQ_LEN.value))
    print(
      f"critical pair {r['critical_pair']}, the first that does not turn fully within "
      f"{r['original_context']:,} tokens; mean disturbance {np.mean(r['disturbance']):.4f} nats "
      f"at {SEQ_LEN.value or r['context']:,} tokens"
    )
    print(report.frequency_table(r))
  for path in figures:
    print(path)


def _plot(runs) -> list[str]:
  from rope_jax import config as config_lib
  from rope_jax import plots, resolve

  configs = {name or run.rope.scaling: run for name, run in runs.items()}
  first = next(iter(runs.values()))
  for name in COMPARE.value:
    other = copy.deepcopy(first)
    for method in (first.rope.scaling, name):
      if method in other.rope:
        other.rope[method] = config_lib.base().rope[method]
    other.rope.update(scaling=name)
    other.rope.factor = None  # of the contexts, as for all others
    if name not in configs:
      configs[name] = other
  ropes = {}
  for name, run in configs.items():
    r = cli.checked("", resolve.rope, run, SEQ_LEN.value)
    ropes |= {name + which: row for which, row in plots.rows(r).items()}
  original, length = resolve.base(first), SEQ_LEN.value or first.rope.context
  os.makedirs(PLOT.value, exist_ok=True)
  paths = [os.path.join(PLOT.value, f"{name}.{FORMAT.value}") for name in
           ("wavelengths", "angles", "disturbance", "score_decay")]  # fmt: skip
  plots.wavelengths(ropes, paths[0])
  plots.angle_histograms(original, ropes, paths[1], length=length)
  plots.disturbances(original, ropes, paths[2], length=length)
  plots.score_decay(ropes, paths[3], length=length)
  return paths


if __name__ == "__main__":
  cli.run(main)
