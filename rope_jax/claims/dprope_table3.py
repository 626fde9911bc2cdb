"""Table 3 of DPRoPE (arXiv 2410.01490): disturbance D x 1e-3 of Llama-2 at 8k and 16k.

Settings: head_dim 128, theta 10,000, L 4,096, 360 bins, KL(P_L || P_L') summed over bins, mean
over pairs, threshold 0, float64; YaRN with the ramp of the released code. (The paper prints the
other direction; its numbers are these.)
"""

from __future__ import annotations

from rope_jax import markdown
from rope_jax import rope as rope_lib

PUBLISHED = {
  8192: dict(pi=24.08, yarn=25.55, dprope=6.71),
  16_384: dict(pi=33.67, yarn=35.44, dprope=22.92),
}
REDUCTIONS = {8192: 72, 16_384: 32}  # of dprope against pi, per cent


def runs(preset: str, init_from: str) -> dict:
  """None: it is computed."""
  return {}


def report(results: dict, preset: str) -> str:
  """Ours beside the paper's, with a verdict."""
  base = rope_lib.base(head_dim=128, theta=1e4, original_context=4096)
  rows, misses = [], []
  for length, numbers in PUBLISHED.items():
    ours = {}
    for method, paper in numbers.items():
      r = rope_lib.SCALINGS[method](base, length / 4096)
      ours[method] = 1e3 * rope_lib.disturbance(r, base, length).mean()
      rows.append((f"D x 1e-3, {method}", length, ours[method], paper, 0.005))
    cut = 100 * (1 - ours["dprope"] / ours["pi"])
    rows.append(("dprope less than pi, %", length, cut, REDUCTIONS[length], 0.01))
  cells = []
  for what, length, ours, paper, tolerance in rows:
    difference = ours / paper - 1
    cells.append((what, f"{length:,}", f"{ours:.2f}", f"{paper:.2f}", f"{difference:+.2%}"))
    if abs(difference) > tolerance:
      misses.append(f"{what} at {length:,} is off by more than {tolerance:.1%}")
  verdict = "; ".join(misses) if misses else "all within 0.5%, the reductions within 1%"
  table = markdown.table(("", "tokens", "ours", "paper", "difference"), cells)
  return f"{table}\n\nVerdict: {'NOT reproduced: ' if misses else 'reproduced: '}{verdict}."
