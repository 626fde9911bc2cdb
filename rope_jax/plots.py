"""Figures."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
from matplotlib import ticker


def perplexity(results: dict[str, dict], path: str, *, original_context: int) -> None:
  """Perplexity by length and by position of the token in the longest window, run by run.

  Args:
    results: {run: results of its evaluation 'perplexity'}.
    path: PNG or SVG to write.
    original_context: tokens; drawn as a line.
  """
  figure, (by_length, by_position) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
  for run, lengths in results.items():
    n = sorted(map(int, lengths))
    by_length.errorbar(
      n,
      [lengths[str(x)]["ppl"] for x in n],
      [lengths[str(x)]["stderr"] for x in n],
      marker="o",
      capsize=2,
      label=run or "run",
    )
    parts = lengths[str(n[-1])]["by_position"]
    by_position.plot(
      [(p["start"] + p["end"]) / 2 for p in parts],
      [p["ppl"] for p in parts],
      marker="o",
      label=run or "run",
    )
  by_length.set(xlabel="window (tokens)", ylabel="perplexity", title="By length", xscale="log")
  by_length.set_xticks(n, [f"{x:,}" for x in n])
  by_length.minorticks_off()
  by_position.set(
    xlabel="position in the window (tokens)",
    ylabel="perplexity",
    title=f"By position, window of {n[-1]:,} tokens",
  )
  for axes in (by_length, by_position):
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
      which(ticker.StrMethodFormatter("{x:g}"))
    line = dict(color="gray", linestyle="--", linewidth=1, label="trained window")
    axes.axvline(original_context, **line)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
  figure.savefig(path, dpi=120)
  plt.close(figure)
