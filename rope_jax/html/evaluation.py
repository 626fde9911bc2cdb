"""The section of an evaluation: values, tasks, curves, and tables by depth."""

from __future__ import annotations

import math
from html import escape

from rope_jax import report
from rope_jax import results as results_lib
from rope_jax.html import svg
from rope_jax.html.elements import label, table


def section(
  name: str, by_run: dict[str, dict], numbers: dict[str, int], contexts: list[int]
) -> str:
  """The section.

  Args:
    name: of the evaluation.
    by_run: {run: {column: ...}}.
    numbers: {run: its number on the page}.
    contexts: tokens of the windows that the models were trained with.
  """
  columns = results_lib.columns(by_run)
  tasks = results_lib.tasks(by_run)
  out = [f"<h2>{escape(name)}</h2>", _notes(by_run), _values({"": by_run}, columns, numbers)]
  if tasks:
    table = _values(tasks, columns, numbers)
    out.append(f"<details><summary>{len(tasks)} tasks</summary>{table}</details>")
  figures = _by_length(by_run, numbers, contexts) + _by_position(by_run, numbers, contexts)
  figures = "".join(f"<figure>{figure}</figure>" for figure in figures)
  out += [f'<div class="figures">{figures}</div>'] * bool(figures)
  depths = _depths(by_run, numbers)
  for task, of_task in tasks.items():
    depths += _depths(of_task, numbers, task)
  out += [f'<div class="figures">{"".join(depths)}</div>'] * bool(depths)
  return f"<section>{''.join(out)}</section>"


def _notes(by_run: dict[str, dict]) -> str:
  """What the numbers are, and what a result says of itself in words."""
  cells = [(run, r) for run, columns in by_run.items() for r in columns.values()]
  metrics = list(dict.fromkeys(r["metric"] for _, r in cells))
  notes = []
  for metric in metrics:
    better = "lower" if results_lib.lower_is_better(metric) else "higher"
    notes.append(f"{_metric(metric)}, {better} is better")
  notes += ["columns are lengths in tokens"] * bool(results_lib.lengths(by_run))
  notes += ["± standard error"] * any("stderr" in r for _, r in cells)
  notes += ["[95% interval]"] * any("low" in r for _, r in cells)
  thresholds = {r["threshold"] for _, r in cells if "threshold" in r}
  notes += [f"holds at {t:g} or more" for t in sorted(thresholds)]
  warnings = report.mixed(by_run)
  for key in dict.fromkeys(k for _, r in cells for k, v in r.items() if isinstance(v, str)):
    of_run = {run: r[key] for run, r in cells if key in r}
    if key in ("metric", "text"):
      continue
    if len(set(of_run.values())) == 1:
      notes.append(f"{key}: {next(iter(of_run.values()))}")
    else:
      each = ", ".join(f"{value} ({run or 'run'})" for run, value in of_run.items())
      warnings.append(f"Not the same in all runs, so not comparable: {key} {each}.")
  out = f'<p class="note">{escape("; ".join(notes))}</p>'
  return out + "".join(f'<p class="warning">{escape(w)}</p>' for w in warnings)


def _values(groups: dict[str, dict], columns: list[str], numbers: dict[str, int]) -> str:
  """A table of runs by columns: a body for each group, headed by its name if it has one."""
  every = [r for by_run in groups.values() for c in by_run.values() for r in c.values()]
  mixed = len({r["metric"] for r in every}) > 1
  reaches = {
    (group, run): report.reach(c) for group, by_run in groups.items() for run, c in by_run.items()
  }
  reached = any(reach is not None for reach in reaches.values())
  head = '<th scope="col"><button>run</button></th>'
  for column in columns:
    text = f"{int(column):,}" if column.isdigit() else escape(column)
    if mixed:  # which one is said in the heading of each column
      of_column = {r[column]["metric"] for g in groups.values() for r in g.values() if column in r}
      text += f" <small>{escape(', '.join(map(_metric, sorted(of_column))))}</small>"
    head += f'<th scope="col"><button>{text}</button></th>'
  head += '<th scope="col"><button>holds to</button></th>' * reached
  bodies = []
  for group, by_run in groups.items():
    bests = {column: results_lib.best(by_run, column) for column in columns}
    rows = [
      f'<tr class="group"><th colspan="{len(columns) + 1 + reached}">{escape(group)}</th></tr>'
    ]
    rows = rows if group else []
    for run, by_column in by_run.items():
      cells = "".join(_cell(by_column.get(c), run in bests[c]) for c in columns)
      if reached:
        reach = reaches[group, run]
        text = "" if reach is None else f"{reach:,}" if reach else "–"
        cells += f'<td data-value="{reach or 0}">{text}</td>'
      rows.append(f'<tr data-run="{numbers[run]}"><th scope="row">{label(run)}</th>{cells}</tr>')
    bodies.append(rows)
  return table(head, bodies)


def _cell(r: dict | None, best: bool) -> str:
  if r is None:
    return "<td></td>"
  value, sure = report.shown(r)
  number = r[r["metric"]]
  better = "lower" if results_lib.lower_is_better(r["metric"]) else "higher"
  known = f' data-value="{number!r}" data-better="{better}"'.replace('"inf"', '"Infinity"')
  known = "" if math.isnan(number) else known
  what = f' title="{r["samples"]:,} samples"' if isinstance(r.get("samples"), int) else ""
  mark = ' class="best"' * best
  return f"<td{mark}{known}{what}>{value}" + (f" <small>{sure}</small>" if sure else "") + "</td>"


def _by_length(by_run, numbers, contexts) -> list[str]:
  lengths = results_lib.lengths(by_run)
  if len(lengths) < 2:
    return []  # one point each: the table says it
  curves, metric = {}, ""
  for run, columns in by_run.items():
    found = [(int(n), columns[n]) for n in lengths if n in columns]
    metric = found[0][1]["metric"] if found else metric
    curves[numbers[run]] = [
      _point(n, r, r["metric"], f"{run or 'run'}, {n:,} tokens: {report.cell(r)}") for n, r in found
    ]
  ticks = [int(n) for n in lengths]
  return _charts(curves, metric, "By length", "length (tokens)", lines=contexts, x_ticks=ticks)


def _by_position(by_run, numbers, contexts) -> list[str]:
  out = []
  for column, of_run in results_lib.positions(by_run).items():
    curves = {}
    for run, parts in of_run.items():
      metric = by_run[run][column]["metric"]
      curves[numbers[run]] = [
        _point(
          (p["start"] + p["end"]) / 2,
          p,
          metric,
          f"{run or 'run'}, tokens {p['start']:,} to {p['end']:,}: "
          + report.cell({**p, "metric": metric}),
        )
        for p in parts
      ]
    window = f"{int(column):,} tokens" if column.isdigit() else column
    title = f"By position in {window}"
    out += _charts(curves, metric, title, "position (tokens)", lines=contexts)
  return out


def _charts(curves: dict[int, list], metric: str, title: str, x_label: str, **options) -> list[str]:
  """A chart of all runs; if some broke, another of the rest, which are one line in the first."""
  worst = {run: max(p.value for p in points) for run, points in curves.items() if points}
  fine = {run: curves[run] for run, v in worst.items() if v < 3 * min(worst.values())}
  options |= dict(x_label=x_label, y_label=_metric(metric), metric=metric)
  charts = [svg.chart(curves, title=title, **options)]
  perplexities = results_lib.scale(metric, worst.values()) == "log" if worst else False
  if perplexities and 1 < len(fine) < len(worst):
    charts.append(svg.chart(fine, title=f"{title}, without what broke", **options))
  return list(filter(None, charts))


def _point(x: float, r: dict, metric: str, text: str) -> svg.Point:
  return svg.Point(x, r[metric], *results_lib.interval(r, metric), text)


def _depths(by_run: dict[str, dict], numbers: dict[str, int], task: str = "") -> list[str]:
  """Tables of length by depth with coloured cells, one for each run that has them."""
  found = results_lib.parts(by_run, "by_depth")
  cells = {
    (run, column, p["depth"]): ({**p, "metric": by_run[run][column]["metric"]})
    for column, of_run in found.items()
    for run, parts in of_run.items()
    for p in parts
  }
  if not cells:
    return []
  depths = sorted({depth for _, _, depth in cells})
  metric = next(iter(cells.values()))["metric"]
  shade = results_lib.goodness(metric, [r[r["metric"]] for r in cells.values()])
  heads = [f"{int(c):,}" if c.isdigit() else escape(c) for c in found]
  head = '<th scope="col">depth</th>' + "".join(f'<th scope="col">{h}</th>' for h in heads)
  out = []
  for run, i in numbers.items():
    if not any(run in of_run for of_run in found.values()):
      continue
    rows = [
      f'<tr><th scope="row">{depth:.0%}</th>'
      + "".join(_shaded(cells.get((run, column, depth)), shade) for column in found)
      + "</tr>"
      for depth in depths
    ]
    what = f"{label(run)}{': ' + escape(task) if task else ''}, {escape(_metric(metric))} by depth"
    out.append(
      f'<figure class="depths" data-run="{i}"><figcaption>{what}</figcaption>'
      f"{table(head, [rows])}</figure>"
    )
  return out


def _shaded(r: dict | None, shade) -> str:
  if r is None or math.isnan(value := r[r["metric"]]):
    return "<td></td>"
  stops, place = results_lib.COLOURS, 2 * shade(value)
  i = min(int(place), 1)
  rgb = (round(a + (place - i) * (b - a)) for a, b in zip(stops[i], stops[i + 1]))
  colour = "#" + "".join(f"{x:02x}" for x in rgb)
  text = f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"
  return f'<td style="background:{colour}" title="{escape(report.cell(r))}">{text}</td>'


def _metric(name: str) -> str:
  return report.metric({"": {"metric": name}})
