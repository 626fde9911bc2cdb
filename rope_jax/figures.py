"""Figures of results, as PNG or SVG by the name of the file; those of ropes are in `plots`.

All take {run: {column: ...}} of one evaluation (the form: `rope_jax.evals`) and know no type.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.colors import LinearSegmentedColormap

from rope_jax import report
from rope_jax import results as results_lib


def write(results: dict[str, dict], workdir: str, *, original_contexts: Iterable[int] = ()) -> list:
  """WORKDIR/NAME.png of each evaluation by length, WORKDIR/NAME_depths.png of those with depths.

  Args:
    results: {run: {evaluation: {column: ...}}}.
    workdir: where to write.
    original_contexts: tokens; each is drawn as a line.

  Returns:
    The paths.
  """
  paths = []
  for name, by_run in results_lib.evaluations(results).items():
    if results_lib.lengths(by_run):
      paths.append(os.path.join(workdir, f"{name}.png"))
      by_length(by_run, paths[-1], original_contexts=original_contexts)
    if results_lib.parts(report.rows(by_run), "by_depth"):
      paths.append(os.path.join(workdir, f"{name}_depths.png"))
      heatmap(by_run, paths[-1])
  return paths


def by_length(
  results: dict[str, dict], path: str, *, original_contexts: Iterable[int] = ()
) -> None:
  """Values by length, run by run; beside them those by position in the longest window, if any.

  Perplexities are drawn on a logarithmic axis, shares on one from 0 to 1.

  Args:
    results: {run: {column: ...}}; columns that are no lengths are left out.
    path: PNG or SVG to write.
    original_contexts: tokens; each is drawn as a line.
  """
  lengths = results_lib.lengths(results)
  what = report.metric({c: r for by_column in results.values() for c, r in by_column.items()})
  windows = {c: x for c, x in results_lib.positions(results).items() if c in lengths}
  panels = 1 + len(windows)
  figure, grid = plt.subplots(
    1, panels, figsize=(5.5 * panels, 4), constrained_layout=True, squeeze=False
  )
  axes, *others = grid[0]
  drawn = []
  for i, (run, columns) in enumerate(results.items()):
    points = [(int(n), columns[n], columns[n]["metric"]) for n in lengths if n in columns]
    drawn += _curve(axes, points, run, i)
  axes.set(xlabel="length (tokens)", ylabel=what, title="By length", xscale="log")
  axes.set_xticks(ticks := [int(n) for n in lengths], [f"{n:,}" for n in ticks])
  axes.minorticks_off()
  _scale(axes, what, drawn)
  for axes, (column, by_run) in zip(others, windows.items()):
    drawn = []
    for i, run in enumerate(results):
      metric = results[run][column]["metric"] if run in by_run else ""
      points = [((p["start"] + p["end"]) / 2, p, metric) for p in by_run.get(run, [])]
      drawn += _curve(axes, points, run, i)
    title = f"By position, window of {int(column):,} tokens"
    axes.set(xlabel="position in the window (tokens)", ylabel=what, title=title)
    _scale(axes, what, drawn)
  for axes in grid[0]:
    for i, context in enumerate(sorted(set(original_contexts))):
      label = dict(label="trained window") if i == 0 else {}
      axes.axvline(context, color="gray", linestyle="--", linewidth=1, **label)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def heatmap(results: dict[str, dict], path: str) -> None:
  """Values by length and by depth of what is to be found, a panel for each run.

  Depth 0 (the start of the text) is at the top. Colours of shares go from 0 to 1 in all figures,
  so that they can be compared; those of perplexities from the worst to the best.

  Args:
    results: {run: {column: ...}} with "by_depth"; tasks that have it get panels of their own.
    path: PNG or SVG to write.
  """
  rows = report.rows(results)
  found = results_lib.parts(rows, "by_depth")
  labels = [label for label in rows if any(label in by_run for by_run in found.values())]
  depths = sorted({p["depth"] for by_run in found.values() for x in by_run.values() for p in x})
  place = {depth: i for i, depth in enumerate(depths)}
  values = {label: np.full((len(depths), len(found)), np.nan) for label in labels}
  for j, (column, by_run) in enumerate(found.items()):
    for label, parts in by_run.items():
      for p in parts:
        values[label][place[p["depth"]], j] = p[metric := rows[label][column]["metric"]]
  everything = np.concatenate([x[~np.isnan(x)] for x in values.values()]).tolist()
  shade = results_lib.goodness(metric, everything)
  share = results_lib.scale(metric, everything) == "share"

  across = min(len(labels), 3)
  down = -(-len(labels) // across)
  width, height = 1.5 + 0.75 * len(found), 1.2 + 0.36 * len(depths)
  figure, grid = plt.subplots(
    down, across, figsize=(width * across + 0.8, height * down + 0.3), constrained_layout=True,
    squeeze=False,
  )  # fmt: skip
  colours = LinearSegmentedColormap.from_list("", np.array(results_lib.COLOURS) / 255)
  for axes, label in zip(grid.flat, labels):
    shades = np.vectorize(lambda v: np.nan if np.isnan(v) else shade(v))(values[label])
    image = axes.imshow(shades, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (i, j), v in np.ndenumerate(values[label]):
      axes.text(j, i, "" if np.isnan(v) else _short(v), ha="center", va="center", fontsize=8)
    columns = [f"{int(c):,}" if c.isdigit() else c for c in found]
    axes.set_xticks(range(len(found)), columns, rotation=30, fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
    axes.set_title(label or "run", fontsize=10)
  for axes in grid.flat[len(labels) :]:
    axes.set_axis_off()
  figure.supxlabel("length (tokens)", fontsize=9)
  figure.supylabel("depth", fontsize=9)
  bar = figure.colorbar(image, ax=grid, shrink=0.9)
  what = report.metric({"": {"metric": metric}})
  bar.set_label(what if share else f"{what}, worst to best")
  if not share:
    bar.set_ticks([])
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _curve(axes, points: list[tuple], run: str, i: int) -> list[float]:
  """Draws (x, result, metric) of a run with error bars; returns the values."""
  values = [r[metric] for _, r, metric in points]
  if not points:
    return []
  ends = [results_lib.interval(r, metric) for _, r, metric in points]
  errors = [[max(v - low, 0) for v, (low, _) in zip(values, ends)],
            [max(high - v, 0) for v, (_, high) in zip(values, ends)]]  # fmt: skip
  style = dict(color=f"C{i % 10}", marker="osD^v"[i % 5], markersize=5, capsize=2)
  axes.errorbar([x for x, _, _ in points], values, errors, label=run or "run", **style)
  return values


def _scale(axes, metric: str, values: list[float]) -> None:
  kind = results_lib.scale(metric, values)
  if kind == "share":
    axes.set_ylim(-0.03, 1.03)
  if kind == "log":
    axes.set_yscale("log")
    few = ticker.StrMethodFormatter("{x:,g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(few)
    # Between powers of ten there is room for numbers only if these are few.
    axes.yaxis.set_minor_formatter(few if high < 20 * low else ticker.NullFormatter())


def _short(value: float) -> str:
  return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"
