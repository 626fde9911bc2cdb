"""Published claims, each run anew with its controls: the paper's number beside ours.

A claim is a module. Its docstring says what is claimed, where, and how it is tried here; then

  runs(preset, init_from) -> {name: config}    what is trained and evaluated, in order
  report(results, preset) -> str               Markdown: tables and a verdict, of the runs there are

and, where there is something to look at,

  figure(results, preset, path) -> bool        a PNG or SVG; False if nothing is to be drawn

`results` is {run: {evaluation: {column: ...}}}. Claims that need no run have none: {}.
"""

from rope_jax.claims import (
  dprope_ablation,
  dprope_table3,
  posgen_table1,
  psc_table,
  resonance_theory,
  smollm2_16k,
  yarn_ablation,
)

CLAIMS = {
  "psc-table": psc_table,
  "smollm2-16k": smollm2_16k,
  "posgen-table1": posgen_table1,
  "dprope-table3": dprope_table3,
  "dprope-ablation": dprope_ablation,
  "resonance-theory": resonance_theory,
  "yarn-ablation": yarn_ablation,
}
PRESETS = ("mini", "paper")
