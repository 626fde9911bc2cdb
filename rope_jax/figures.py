"""Figures of results, as PNG or SVG by the name of the file; those of ropes are in `plots`.

All take {run: {column: ...}} of one evaluation (the form: `rope_jax.evals`) and know no type; they
return the figure, which a notebook shows, and without a path write nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from matplotlib import ticker
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure  # not pyplot: no screen needed, and a notebook keeps its own

from rope_jax import plots, report
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
  results: dict[str, dict], path: str | None = None, *, original_contexts: Iterable[int] = ()
) -> Figure:
  """Values by length, run by run; beside them those by position in the longest window, if any.

  Perplexities are drawn on a logarithmic axis, shares on one from 0 to 1.

  Args:
    results: {run: {column: ...}}; columns that are no lengths are left out.
    path: PNG or SVG to write; None writes none.
    original_contexts: tokens; each is drawn as a line.
  """
  lengths, windows = results_lib.lengths(results), _windows(results)
  figure, (axes, *others) = _panels(1 + len(windows))
  drawn, what = [], _metric(results)
  for i, (run, columns) in enumerate(results.items()):
    points = [(int(n), columns[n], columns[n]["metric"]) for n in lengths if n in columns]
    drawn += _curve(axes, points, run, i)
  axes.set(xlabel="length (tokens)", ylabel=what, title="By length", xscale="log")
  axes.set_xticks(ticks := [int(n) for n in lengths], [f"{n:,}" for n in ticks])
  axes.minorticks_off()
  _scale(axes, what, drawn)
  _draw_windows(others, windows, results)
  return _finish(figure, original_contexts, path)


def by_position(
  results: dict[str, dict], path: str | None = None, *, original_contexts: Iterable[int] = ()
) -> Figure:
  """Values by position in the longest window alone, run by run: as beside those by length.

  Args:
    results, path, original_contexts: as for `by_length`.

  Raises:
    ValueError: if there are none by position.
  """
  windows = results_lib.positions(results)
  if not windows:
    raise ValueError("by_position: these results have no values by position")
  figure, panels = _panels(len(windows))
  _draw_windows(panels, windows, results)
  return _finish(figure, original_contexts, path)


def heatmap(results: dict[str, dict], path: str | None = None) -> Figure:
  """Values by length and by depth of what is to be found, a panel for each run.

  Depth 0 (the start of the text) is at the top. Colours of shares go from 0 to 1 in all figures,
  so that they can be compared; those of perplexities from the worst to the best.

  Args:
    results: {run: {column: ...}} with "by_depth"; tasks that have it get panels of their own.
    path: PNG or SVG to write; None writes none.
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
  figure = Figure(figsize=(width * across + 0.8, height * down + 0.3), layout="constrained")
  grid = figure.subplots(down, across, squeeze=False)
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
  return plots.saved(figure, path)


def _metric(results: dict[str, dict]) -> str:
  return report.metric({c: r for by_column in results.values() for c, r in by_column.items()})


def _windows(results: dict[str, dict]) -> dict:
  lengths = results_lib.lengths(results)
  return {c: x for c, x in results_lib.positions(results).items() if c in lengths}


def _panels(count: int) -> tuple[Figure, list]:
  figure = Figure(figsize=(5.5 * count, 4), layout="constrained")
  return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw_windows(panels: list, windows: dict, results: dict[str, dict]) -> None:
  """Values by position, a panel for each column that has them."""
  what = _metric(results)
  for axes, (column, by_run) in zip(panels, windows.items()):
    drawn = []
    for i, run in enumerate(results):
      metric = results[run][column]["metric"] if run in by_run else ""
      points = [((p["start"] + p["end"]) / 2, p, metric) for p in by_run.get(run, [])]
      drawn += _curve(axes, points, run, i)
    title = f"By position, window of {int(column):,} tokens" if column.isdigit() else "By position"
    if len(windows) > 1 and not column.isdigit():
      title = column
    axes.set(xlabel="position in the window (tokens)", ylabel=what, title=title)
    _scale(axes, what, drawn)


def _finish(figure: Figure, original_contexts: Iterable[int], path: str | None) -> Figure:
  contexts = sorted(set(original_contexts))
  for axes in figure.axes:
    for i, context in enumerate(contexts):
      label = dict(label="original window") if i == 0 else {}
      axes.axvline(context, color="gray", linestyle="--", linewidth=1, **label)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
  return plots.saved(figure, path)


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
