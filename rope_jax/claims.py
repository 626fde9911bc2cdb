"""Published claims that need no training, with the paper's number beside ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rope_jax import rope as rope_lib


def dprope_table3() -> str:
  """Table 3 of DPRoPE (arXiv 2410.01490): disturbance D x 1e-3 of Llama-2 at 8k and 16k.

  Settings: head_dim 128, theta 10,000, L 4,096, 360 bins, KL(P_L || P_L') summed over bins, mean
  over pairs, threshold 0, float64; YaRN with the ramp of the released code. (The paper prints the
  other direction; its numbers are these.)
  """
  published = {
    8192: dict(pi=24.08, yarn=25.55, dprope=6.71),
    16_384: dict(pi=33.67, yarn=35.44, dprope=22.92),
  }
  reductions = {8192: 72, 16_384: 32}
  base = rope_lib.base(head_dim=128, theta=1e4, original_context=4096)
  rows = [("", "tokens", "ours", "paper", "difference", "")]
  for length, numbers in published.items():
    ours = {}
    for method, paper in numbers.items():
      r = rope_lib.SCALINGS[method](base, length / 4096)
      ours[method] = 1e3 * rope_lib.disturbance(r, base, length).mean()
      rows.append(_row(f"D x 1e-3, {method}", length, ours[method], paper, tolerance=0.005))
    cut = 100 * (1 - ours["dprope"] / ours["pi"])
    rows.append(_row("less than pi, %", length, cut, reductions[length], tolerance=0.01))
  return _table(rows)


def resonance_theory() -> str:
  """Sections 3.2 and 4 of Resonance RoPE (arXiv 2403.00071).

  Llama-2 (head_dim 128, theta 10,000, L 4,096): critical pair, and after how many tokens all
  pre-critical pairs repeat together; then the feature gap of the models of the synthetic task
  (head_dim 64, L 64, 256 tokens), with and without Resonance.
  """
  llama2 = rope_lib.base(head_dim=128, theta=1e4, original_context=4096)
  period = rope_lib.common_period(rope_lib.resonance(llama2))
  small = rope_lib.base(head_dim=64, theta=1e4, original_context=64)
  before, after = (rope_lib.feature_gap(r, 256) for r in (small, rope_lib.resonance(small)))
  c = rope_lib.critical_pair(small)
  theorem = not after[:c].any() and bool((before[:c] > 0).all())
  lines = [
    f"Llama-2: critical pair {rope_lib.critical_pair(llama2)} of 64; the paper: over half are "
    "pre-critical",
    f"         the pre-critical wavelengths repeat together after {float(period):.3e} tokens; "
    "the paper: more than 7e51",
    "",
    f"feature gap of new positions (radians), L=64, 256 tokens; pairs before {c} are pre-critical",
    _table(
      [("pair", "wavelength", "RoPE", "Resonance")]
      + [(str(i), f"{small.wavelengths[i]:.1f}", f"{before[i]:.4f}", f"{after[i]:.4f}")
         for i in range(c + 4)]
    ),
    "",
    "Theorem 1, no gap on any pre-critical pair with Resonance, and some on each without: "
    + ("holds" if theorem else "DOES NOT HOLD"),
  ]  # fmt: skip
  return "\n".join(lines)


CLAIMS: dict[str, Callable[[], str]] = {
  "dprope-table3": dprope_table3,
  "resonance-theory": resonance_theory,
}


def _row(what: str, length: int, ours: float, paper: float, tolerance: float) -> tuple[str, ...]:
  difference = ours / paper - 1
  verdict = "" if abs(difference) <= tolerance else f"more than {tolerance:.1%}: not reproduced"
  return what, f"{length:,}", f"{ours:.2f}", f"{paper:.2f}", f"{difference:+.2%}", verdict


def _table(rows: list[tuple[str, ...]]) -> str:
  widths = np.max([[len(cell) for cell in row] for row in rows], axis=0)
  lines = [
    "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
    for row in rows
  ]
  return "\n".join([lines[0].rstrip(), "-" * int(widths.sum() + 2 * len(widths) - 2)]
                   + [line.rstrip() for line in lines[1:]])  # fmt: skip
