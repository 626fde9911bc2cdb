"""Figures of ropes, as PNG or SVG by the name of the file; those of results are in `figures`.

All take {name: Rope} with frequencies [pairs]; of a rope with frequencies by layer or head, pass
the rows. All return the figure, which a notebook shows; without a path nothing is written. A name
has the same colour in all figures of the same ropes, given in the same order.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no screen needed, and a notebook keeps its own

from rope_jax import rope as rope_lib
from rope_jax.rope import Rope


def rows(rope: Rope) -> dict[str, Rope]:
  """A rope as {label: Rope with frequencies [pairs]}: itself, or one for each layer and head."""
  if rope.inv_freq.ndim == 1:
    return {"": rope}
  axes = ("layer", "head")[: rope.inv_freq.ndim - 1]
  found = {}
  for index in np.ndindex(rope.inv_freq.shape[:-1]):
    label = ", ".join(f"{a} {i}" for a, i in zip(axes, index))
    scale = np.broadcast_to(rope.attention_scale, rope.inv_freq.shape[:-1])[index]
    found[f" {label}"] = dataclasses.replace(
      rope, inv_freq=rope.inv_freq[index], attention_scale=float(scale), period=None
    )
  return found


def wavelengths(ropes: dict[str, Rope], path: str | None = None) -> Figure:
  """Wavelength of each pair, method by method, with the original context as a line.

  Args:
    ropes: by name; pairs that stand still are marked at the upper edge.
    path: file to write; None writes none.
  """
  figure, axes = _figure()
  finite = np.concatenate([r.wavelengths[np.isfinite(r.wavelengths)] for r in ropes.values()])
  top = 3 * finite.max() if finite.size else 1e6
  for i, (name, r) in enumerate(ropes.items()):
    w = r.wavelengths
    (line,) = axes.plot(
      np.where(np.isfinite(w), w, np.nan), marker=_MARKERS[i % 8], ms=3, label=name
    )
    still = np.flatnonzero(~np.isfinite(w))
    axes.plot(still, np.full(len(still), top), "^", color=line.get_color(), ms=4)
  _context_line(axes.axhline, ropes)
  axes.set(
    xlabel="pair of channels, fastest first",
    ylabel="wavelength (tokens)",
    title="Wavelengths" + (" (triangles: no rotation)" if finite.size < _size(ropes) else ""),
    yscale="log",
  )
  return _finish(figure, axes, path)


def angle_histograms(
  original: Rope,
  ropes: dict[str, Rope],
  path: str | None = None,
  *,
  length: int,
  pairs=None,
  bins: int = 90,
) -> Figure:
  """Distribution of the rotation angles of some pairs, in training and after extension.

  Args:
    original: rope of the base model, over its original context.
    ropes: extended ropes, over `length` tokens.
    path: file to write; None writes none.
    length: tokens after extension.
    pairs: which; four around the critical pair if None.
    bins: of a full turn.
  """
  n = len(original.inv_freq)
  c = min(max(rope_lib.critical_pair(original), 3), n - 1)
  pairs = [c // 3, 2 * c // 3, c - 1, min(c + (n - c) // 2, n - 1)] if pairs is None else pairs
  figure = Figure(figsize=(3.6 * len(pairs), 3.6), layout="constrained")
  grid = figure.subplots(1, len(pairs), squeeze=False)
  centres = (np.arange(bins) + 0.5) / bins * 360
  before = rope_lib.angle_histogram(original, original.original_context, bins)
  after = {name: rope_lib.angle_histogram(r, length, bins) for name, r in ropes.items()}
  for axes, pair in zip(grid[0], pairs):
    axes.fill_between(centres, before[pair] * bins, step="mid", alpha=0.3, color="gray",
                      label=f"trained, {original.original_context:,} tokens")  # fmt: skip
    for name, histogram in after.items():
      axes.step(centres, histogram[pair] * bins, where="mid", lw=1, label=f"{name}, {length:,}")
    top = 1.6 * max(before[pair].max() * bins, 1)  # a pair that stands still is all in one bin
    axes.set(
      ylim=(0, top), title=f"pair {pair}", xlabel="angle (degrees)", xticks=[0, 90, 180, 270, 360]
    )
    axes.grid(alpha=0.3)
  grid[0][0].set_ylabel("density (1: uniform)")
  grid[0][-1].legend(fontsize=8)
  return saved(figure, path)


def disturbances(
  original: Rope, ropes: dict[str, Rope], path: str | None = None, *, length: int
) -> Figure:
  """Disturbance of each pair's angle distribution (DPRoPE), method by method; means in the legend.

  Args:
    original: rope of the base model.
    ropes: extended ropes.
    path: file to write; None writes none.
    length: tokens after extension.
  """
  figure, axes = _figure()
  for i, (name, r) in enumerate(ropes.items()):
    d = np.maximum(rope_lib.disturbance(r, original, length), 1e-9)
    axes.plot(d, marker=_MARKERS[i % 8], ms=3, label=f"{name}, mean {d.mean():.4f}")
  axes.axvline(rope_lib.critical_pair(original), **_LINE, label="critical pair")
  axes.set(
    xlabel="pair of channels, fastest first",
    ylabel="disturbance (nats)",
    title=f"Disturbance of the rotary-angle distribution at {length:,} tokens",
    yscale="log",
  )
  return _finish(figure, axes, path)


def feature_gaps(ropes: dict[str, Rope], path: str | None = None, *, length: int) -> Figure:
  """How far new angles are from any that was trained, pair by pair, method by method (Resonance).

  Of models that are trained with these ropes on their original context. The axis is logarithmic
  down to a tenth of a degree and linear below, so that a gap of zero can be seen.

  Args:
    ropes: by name.
    path: file to write; None writes none.
    length: tokens that are read, above the original context.
  """
  figure, axes = _figure()
  for i, (name, r) in enumerate(ropes.items()):
    gaps = np.degrees(rope_lib.feature_gap(r, length))
    axes.plot(gaps, marker=_MARKERS[i % 8], ms=3, label=name)
  first, r = next(iter(ropes.items()))
  axes.axvline(rope_lib.critical_pair(r), **_LINE, label=f"critical pair of {first}")
  axes.set_yscale("symlog", linthresh=0.1)
  axes.set_yticks(ticks := [0, 0.1, 1, 10, 100], [f"{x:g}" for x in ticks])
  axes.set(
    xlabel="pair of channels, fastest first",
    ylabel="largest distance to a trained angle (degrees)",
    title=f"Feature gap: trained at {r.original_context:,} tokens, read at {length:,}",
    ylim=(-0.02, 200),
  )
  return _finish(figure, axes, path)


def score_decay(ropes: dict[str, Rope], path: str | None = None, *, length: int) -> Figure:
  """Attention score of two equal vectors by their distance: what the rotation alone does to it.

  The mean over pairs of cos(distance * inv_freq), times the square of the attention scale; drawn
  as the mean over logarithmic bins of the distance.

  Args:
    ropes: by name.
    path: file to write; None writes none.
    length: longest distance in tokens.
  """
  figure, axes = _figure()
  edges = np.unique(np.geomspace(1, length, 200).astype(int))
  distances = np.arange(edges[0], edges[-1] + 1)
  for name, r in ropes.items():
    score = np.zeros(len(distances))
    for frequency in r.inv_freq:
      score += np.cos(distances * frequency)
    score *= float(np.mean(r.attention_scale)) ** 2 / len(r.inv_freq)
    means = np.add.reduceat(score, edges[:-1] - 1)[:-1] / np.diff(edges)[:-1]
    axes.plot(np.sqrt(edges[:-2] * edges[1:-1]), means, label=name)
  _context_line(axes.axvline, ropes)
  axes.set(xlabel="distance (tokens)", ylabel="score of equal vectors, relative to no rotation",
           title="Decay of the attention score", xscale="log")  # fmt: skip
  return _finish(figure, axes, path)


def saved(figure: Figure, path: str | None) -> Figure:
  """The figure, written to a file unless the path is None."""
  if path is not None:
    figure.savefig(path, dpi=120)
  return figure


_MARKERS = "os^vDxP*"
_LINE = dict(color="gray", linestyle="--", linewidth=1)


def _size(ropes: dict[str, Rope]) -> int:
  return sum(r.inv_freq.size for r in ropes.values())


def _context_line(draw, ropes: dict[str, Rope]) -> None:
  context = next(iter(ropes.values())).original_context
  draw(context, **_LINE, label=f"original context, {context:,}")


def _figure():
  figure = Figure(figsize=(8, 5), layout="constrained")
  return figure, figure.subplots()


def _finish(figure: Figure, axes, path: str | None) -> Figure:
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  return saved(figure, path)
