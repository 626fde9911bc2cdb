"""Sections 3.2 and 4 of Resonance RoPE (arXiv 2403.00071).

Llama-2 (head_dim 128, theta 10,000, L 4,096): critical pair, and after how many tokens all
pre-critical pairs repeat together; then the feature gap of the models of the synthetic task
(head_dim 64, L 64, 256 tokens), with and without Resonance.
"""

from __future__ import annotations

from rope_jax import markdown
from rope_jax import rope as rope_lib


def runs(preset: str, init_from: str) -> dict:
  """None: it is computed."""
  return {}


def report(results: dict, preset: str) -> str:
  """Ours beside the paper's, with a verdict."""
  llama2 = rope_lib.base(head_dim=128, theta=1e4, original_context=4096)
  critical = rope_lib.critical_pair(llama2)
  period = float(rope_lib.common_period(rope_lib.resonance(llama2)))
  small = rope_lib.base(head_dim=64, theta=1e4, original_context=64)
  before, after = (rope_lib.feature_gap(r, 256) for r in (small, rope_lib.resonance(small)))
  c = rope_lib.critical_pair(small)
  facts = markdown.table(
    ("Llama-2", "ours", "paper"),
    [("pre-critical pairs of 64", str(critical), "over half"),
     ("tokens after which they repeat together", f"{period:.3e}", "more than 7e51")],
  )  # fmt: skip
  gaps = markdown.table(
    (f"pair (before {c}: pre-critical)", "wavelength", "gap, RoPE", "gap, Resonance"),
    [(str(i), f"{small.wavelengths[i]:.1f}", f"{before[i]:.4f}", f"{after[i]:.4f}")
     for i in range(c + 4)],
  )  # fmt: skip
  theorem = not after[:c].any() and bool((before[:c] > 0).all())
  holds = theorem and critical > 32 and period > 7e51
  return (
    f"{facts}\n\nFeature gap of new positions (radians), L = 64, 256 tokens:\n\n{gaps}\n\n"
    "Theorem 1, no gap on any pre-critical pair with Resonance, and some on each without: "
    f"{'holds' if theorem else 'DOES NOT HOLD'}.\n\n"
    f"Verdict: {'reproduced' if holds else 'NOT reproduced'}."
  )
