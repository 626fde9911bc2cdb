"""Figures of searches, as PNG or SVG by the name of the file."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np

_MARKERS = "os^vDxP*"


def factors(lists: dict[str, tuple], path: str, *, critical: int | None = None) -> None:
  """Factors of each pair, by name.

  Args:
    lists: name -> [pairs].
    path: file to write.
    critical: the critical pair, drawn as a line.
  """
  figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
  for i, (name, values) in enumerate(lists.items()):
    last = i == len(lists) - 1
    axes.plot(values, marker=_MARKERS[i % 8], ms=4 if last else 3, lw=2 if last else 1, label=name)
  if critical is not None:
    axes.axvline(critical, color="gray", ls="--", lw=1, label="critical pair")
  axes.set(xlabel="pair of channels, fastest first", ylabel="factor λ", title="Rescale factors")
  _finish(figure, axes, path)


def fitness(
  curves: dict[str, list], seeds: dict[str, float], path: str, *, label: str, perplexity: bool
) -> None:
  """The best fitness so far, over forward passes of the whole fitness.

  Args:
    curves: name -> [[evaluations, best], ...].
    seeds: name -> fitness of a method that needs no search, drawn as a line.
    path: file to write.
    label: of the fitness.
    perplexity: whether it is a mean loss, to be shown as its exponential.
  """
  figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
  shown = (lambda x: np.exp(np.minimum(x, 700))) if perplexity else np.asarray
  seen = []
  for name, curve in curves.items():
    n, best = np.array(curve, np.float64).T
    (line,) = axes.step(n, shown(best), where="post", label=f"{name}, {shown(best[-1]):.4g}")
    axes.plot(n[-1], shown(best[-1]), "o", ms=4, color=line.get_color())
    seen += list(shown(best[np.isfinite(best)]))
  for i, (name, value) in enumerate(seeds.items()):
    if np.isfinite(value):
      axes.axhline(shown(value), color=f"C{i + len(curves)}", ls="--", lw=1,
                   label=f"factors of {name}, {shown(value):.4g}")  # fmt: skip
  seen = seen or [1.0]  # where nothing was finite
  lowest = min(seen)
  top = min([shown(v) for v in seeds.values() if np.isfinite(v)] + [max(seen)])
  margin = max(top - lowest, 1e-6)
  axes.set(
    xlabel="evaluations (a gradient step counts three passes of its samples)",
    ylabel="perplexity, best so far" if perplexity else "fitness, best so far",
    title=label,
    ylim=(lowest - 0.1 * margin, max(top, lowest) + 0.6 * margin),
  )
  _finish(figure, axes, path)


def _finish(figure, axes, path: str) -> None:
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=120)
  plt.close(figure)
