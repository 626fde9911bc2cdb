"""Curves as inline SVG, coloured by the style sheet of the page that they are in (`html`).

Drawn here and not by matplotlib: so small that every point can have a tooltip, legible in dark and
light, and each curve a group that the page can hide.
"""

from __future__ import annotations

import math
from html import escape
from typing import NamedTuple

from rope_jax import results as results_lib

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 44  # margins
MARKERS = (  # around the point, in its radius of 4
  '<circle r="4"/>',
  '<path d="M-3.6-3.6h7.2v7.2h-7.2z"/>',
  '<path d="M0-5.2 5.2 0 0 5.2-5.2 0z"/>',
  '<path d="M0-4.8 4.8 3.6H-4.8z"/>',
)


class Point(NamedTuple):
  """A value with its interval, and what the tooltip says."""

  x: float
  value: float
  low: float
  high: float
  text: str


def style(run: int) -> str:
  """Classes of a run: its colour, and dashes once the colours begin again."""
  return f"c{run % 8}" + (f" d{run // 8 % 3}" if run >= 8 else "")


def chart(
  curves: dict[int, list[Point]],
  *,
  title: str,
  x_label: str,
  y_label: str,
  metric: str,
  x_ticks: list[int] | None = None,
  lines: list[int] | None = None,
) -> str:
  """A chart of curves by the number of their run.

  Args:
    curves: {run: points}; values that are not finite are left out.
    title: of the chart.
    x_label: of the horizontal axis.
    y_label: of the vertical axis.
    metric: decides on the vertical axis (`results.scale`).
    x_ticks: if given, the horizontal axis is logarithmic, with these ticks.
    lines: places of vertical lines, the windows that the models were trained with.
  """
  curves = {run: [p for p in points if math.isfinite(p.value)] for run, points in curves.items()}
  points = [p for x in curves.values() for p in x]
  if not points:
    return ""
  y = _vertical(metric, points)
  xs = [p.x for p in points] + [x for x in lines or [] if x_ticks or x <= max(p.x for p in points)]
  x = _horizontal(xs, x_ticks)
  out = [
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
    f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>',
    *(f'<path class="grid" d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}"/>'
      f'<text class="end" x="{LEFT - 7}" y="{y(v) + 4:.1f}">{_number(v)}</text>'
      for v in y.ticks),
    *(f'<path class="grid" d="M{x(v):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
      f'<text class="middle" x="{x(v):.1f}" y="{HEIGHT - BOTTOM + 17}">{_number(v)}</text>'
      for v in _apart(x)),
    *(f'<path class="context" d="M{x(v):.1f} {TOP}V{HEIGHT - BOTTOM}"><title>original window, '
      f'{v:,} tokens</title></path>' for v in lines or [] if v in xs),
    f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">'
    f"{escape(x_label)}</text>",
    f'<text class="middle" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">'
    f"{escape(y_label)}</text>",
    *(_curve(run, points, x, y) for run, points in curves.items() if points),
    "</svg>",
  ]  # fmt: skip
  return "\n".join(out)


class _Axis(NamedTuple):
  low: float
  high: float
  start: float  # in the picture
  end: float
  log: bool
  ticks: list[float]

  def __call__(self, v: float) -> float:
    place = math.log if self.log else float
    v = min(max(v, self.low), self.high)
    share = (place(v) - place(self.low)) / (place(self.high) - place(self.low))
    return self.start + share * (self.end - self.start)


def _vertical(metric: str, points: list[Point]) -> _Axis:
  ends = [v for p in points for v in (p.low, p.value, p.high) if math.isfinite(v)]
  kind = results_lib.scale(metric, [p.value for p in points])
  place = HEIGHT - BOTTOM, TOP
  if kind == "share":
    return _Axis(-0.02, 1.02, *place, False, [0, 0.2, 0.4, 0.6, 0.8, 1])
  if kind == "log":
    # An error as large as the value itself would take the axis down to nothing.
    low = min(max(p.low, p.value / 2) for p in points) / 1.05
    high = max(ends) * 1.05
    ticks = [s * 10.0**e for e in range(-3, 305) for s in (1, 2, 5) if low <= s * 10.0**e <= high]
    if len(ticks) > 7:
      ticks = [v for v in ticks if f"{v:.0e}".startswith("1")]
      ticks = ticks[:: -(-len(ticks) // 7)]
    return _Axis(low, high, *place, True, ticks if len(ticks) > 2 else _even(low, high))
  margin = 0.05 * (max(ends) - min(ends)) or 0.5
  low, high = min(ends) - margin, max(ends) + margin
  return _Axis(low, high, *place, False, _even(low, high))


def _horizontal(xs: list[float], ticks: list[int] | None) -> _Axis:
  place = LEFT, WIDTH - RIGHT
  if ticks:
    return _Axis(min(xs) / 1.15, max(xs) * 1.15, *place, True, ticks)
  return _Axis(0, high := max(xs) * 1.05 or 1, *place, False, _even(0, high))


def _even(low: float, high: float) -> list[float]:
  """Four to nine round numbers."""
  rough = (high - low) / 5
  size = 10.0 ** math.floor(math.log10(rough))
  step = next(s * size for s in (1, 2, 5, 10) if s * size >= rough * 0.8)
  return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(x: _Axis) -> list[float]:
  """Those ticks whose numbers do not run into that of the next one."""
  kept: list[float] = []
  for v in sorted(x.ticks, reverse=True):
    if not kept or x(kept[-1]) - x(v) > 12 + 3.3 * (len(_number(v)) + len(_number(kept[-1]))):
      kept.append(v)
  return kept


def _curve(run: int, points: list[Point], x: _Axis, y: _Axis) -> str:
  path = "M" + "L".join(f"{x(p.x):.1f} {y(p.value):.1f}" for p in points)
  bars = "".join(
    f"M{x(p.x):.1f} {y(p.low):.1f}V{y(p.high):.1f}"
    for p in points
    if p.low < p.high and math.isfinite(p.low) and math.isfinite(p.high)
  )
  marks = "".join(
    f'<g transform="translate({x(p.x):.1f} {y(p.value):.1f})">{MARKERS[run % 4]}'
    f"<title>{escape(p.text)}</title></g>"
    for p in points
  )
  bars = bars and f'<path class="bar" d="{bars}"/>'
  return f'<g class="curve {style(run)}" data-run="{run}"><path d="{path}"/>{bars}{marks}</g>'


def _number(v: float) -> str:
  return f"{v:,.0f}" if 10 <= abs(v) < 1e6 and v == int(v) else f"{v:.4g}"
