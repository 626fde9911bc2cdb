"""Results for people: lines and tables on the screen."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from rope_jax import resolve
from rope_jax import results as results_lib


def rope_line(c, seq_len: int | None = None) -> str:
  """The resolved rope in one line, for a sequence of `seq_len` tokens where that matters."""
  return described_line(resolve.describe(c, seq_len))


def described_line(r: dict) -> str:
  """The same from what `resolve.describe` gives, which rope.json holds."""
  line = "rope: untouched" if r["scaling"] == "none" else f"rope: {r['scaling']}"
  line += f" x{r['factor']:g}" if r["factor"] != 1 else ""
  line += " over the checkpoint's own" if r["base"] == "checkpoint" else ""
  line += (
    " in evaluations only" if r.get("training") == "unscaled" and r["scaling"] != "none" else ""
  )
  line += ", resonance" if r["resonance"] else ""
  line += f", phase {r['phase']}" if r["phase"] != "none" else ""
  line += f", at {r['seq_len']:,} tokens" if "seq_len" in r else ""
  line += f"; context {r['original_context']:,} -> {r['context']:,}, theta {r['theta']:g}"
  scale, w = np.asarray(r["attention_scale"]), np.array(r["wavelengths"], np.float64)  # None: nan
  line += f", attention scale {scale.min():.4f}"
  line += f" .. {scale.max():.4f}" if scale.min() != scale.max() else ""
  if np.isnan(w).all():
    return line + ", no pair turns"
  line += f", wavelengths {np.nanmin(w):.2f} .. {np.nanmax(w):,.0f} tokens"
  still = np.isnan(w).sum()
  return line + (f", {still} of {w.size} pairs stand still" if still else "")


def frequency_table(described: dict) -> str:
  """A row for each pair: frequency, wavelength, turns within the original context, disturbance.

  Frequencies that differ by layer or head are shown one after the other.
  """
  pairs = np.shape(described["inv_freq"])[-1]
  tables = [
    np.reshape(described[k], (-1, pairs)) for k in ("inv_freq", "wavelengths", "disturbance")
  ]
  heading = f"{'pair':>5} {'inv_freq (rad/token)':>22} {'wavelength (tokens)':>22}"
  lines = [heading + f" {'turns':>12} {'disturbance':>12}"]
  for row, (inv_freq, wavelengths, disturbance) in enumerate(zip(*tables)):
    if len(tables[0]) > 1:
      lines.append(f"-- row {row} of {len(tables[0])} (layers, then heads)")
    for i, (f, w, d) in enumerate(zip(inv_freq, wavelengths, disturbance)):
      turns = described["original_context"] * f / (2 * np.pi)
      shown = "stands still" if w is None else f"{w:,.3f}"
      lines.append(f"{i:>5} {f:>22.9g} {shown:>22} {turns:>12.3g} {d:>12.3g}")
  return "\n".join(lines)


def table(results: dict[str, dict]) -> str:
  """Results of {run: {evaluation: {column: ...}}}, a table for each evaluation, a row for each run.

  Where the value of a column is the mean of tasks, these have rows of their own; where a column
  asks to show its parts by position, these have a table of their own.
  """
  names = list(dict.fromkeys(name for evaluations in results.values() for name in evaluations))
  tables = []
  for name in names:
    of_name = {run: e[name] for run, e in results.items() if name in e}
    tables += [_table(name, of_name), *_curves(name, of_name)]
  return "\n\n".join(tables) or "no evaluations"


def brief(name: str, columns: dict[str, dict]) -> str:
  """A result in one line, as soon as it is there."""
  return f"{name}: " + "; ".join(f"{_column(c)}: {cell(r)}" for c, r in columns.items())


def cell(r: dict | None) -> str:
  """A value and how sure it is: 12.345 ± 0.123, or 0.80 [0.49, 0.94]."""
  return " ".join(filter(None, shown(r))) if r else ""


def shown(r: dict) -> tuple[str, str]:
  """A value, and how sure it is, '' if unknown: ("12.345", "± 0.123"), ("0.80", "[0.49, 0.94]")."""
  value, digits = r[r["metric"]], 3 if "stderr" in r else 2
  text = f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"  # a model that broke
  if "stderr" in r:
    return text, f"± {r['stderr']:.3f}" if abs(value) < 1e6 else f"± {r['stderr']:.3g}"
  return text, f"[{r['low']:.2f}, {r['high']:.2f}]" if "low" in r else ""


def rows(results: dict[str, dict]) -> dict[str, dict]:
  """{run: {column: ...}} of one evaluation as {label: {column: ...}}, tasks after their mean."""
  out = {}
  for run, columns in results.items():
    out[run] = columns
    for task in dict.fromkeys(t for r in columns.values() for t in r.get("tasks", ())):
      out[f"{run} {task}".strip()] = {
        column: r["tasks"][task] for column, r in columns.items() if task in r.get("tasks", ())
      }
  return out


def reach(columns: dict[str, dict]) -> int | None:
  """The longest of the lengths whose value reaches the threshold, 0 if none; None without one.

  RULER's effective length and YaRN's passkey context. Lengths after the first that fails do not
  count: what fails at 8k is not good to 16k.
  """
  longest = 0
  if not columns or any("threshold" not in r for r in columns.values()):
    return None
  if not all(c.isdigit() for c in columns):
    return None  # not lengths
  for column in sorted(columns, key=int):
    r = columns[column]
    if r[r["metric"]] < r["threshold"]:
      break
    longest = int(column)
  return longest


def metric(columns: dict[str, dict]) -> str:
  """What the values of an evaluation are, in words."""
  return {"ppl": "perplexity"}.get(name := next(iter(columns.values()))["metric"], name)


def _table(name: str, results: dict[str, dict]) -> str:
  results = {run: columns for run, columns in results.items() if columns}
  if not results:
    return f"{name}: no results"
  columns = results_lib.columns(results)
  metrics = {c: metric({c: r[c]}) for r in results.values() for c in r}
  what = next(iter(metrics.values()))
  heading = what if what == name else f"{name}: {what}"
  heading += " at" if all(c.isdigit() for c in columns) else ""
  labels = [_column(c) for c in columns]
  if len(set(metrics.values())) > 1:  # tasks that are scored each in its way
    heading, labels = name, [f"{label}: {metrics[c]}" for label, c in zip(labels, columns)]
  reaches = {run: reach(r) for run, r in results.items()}
  reached = any(x is not None for x in reaches.values())
  cells = [[heading, *labels]]
  cells[0] += ["holds to"] * reached
  for label, by_column in rows(results).items():
    longest = reaches.get(label)
    cells.append([label or "-", *(cell(by_column.get(c)) for c in columns)])
    cells[-1] += ["" if longest is None else f"{longest:,}" if longest else "-"] * reached
  return "\n".join([_grid(cells), *mixed(results)])


def mixed(results: dict[str, dict]) -> list[str]:
  """A warning where runs of {run: {column: ...}} have read different texts; else nothing."""
  columns = ", ".join(map(_column, results_lib.mixed(results)))
  why = "samples are as long as the longest length asked for"
  return [f"Not of one text in all runs, so not comparable: {columns} ({why})."] * bool(columns)


def _column(name: str) -> str:
  return f"{int(name):,}" if name.isdigit() else name


def _curves(name: str, results: dict[str, dict]) -> list[str]:
  """Tables of the columns that show their parts by position: a row a part, a column a run."""
  tables = []
  for column in dict.fromkeys(c for r in results.values() for c in r):
    of_run = {run: r[column] for run, r in results.items() if column in r}
    shown = {run: r for run, r in of_run.items() if r.get("show") == "by_position"}
    parts: dict[tuple, dict] = {}
    for run, r in shown.items():
      for part in r["by_position"]:
        parts.setdefault((part["start"], part["end"]), {})[run] = dict(part, metric=r["metric"])
    if parts:
      what = next(iter(shown.values()))["metric"]
      rows = [
        [f"tokens {start:,} .. {end - 1:,}", *(cell(by_run.get(run)) for run in shown)]
        for (start, end), by_run in sorted(parts.items())
      ]
      tables.append(
        _grid([[f"{name}: {what} by position", *(run or what for run in shown)], *rows])
      )
  return tables


def _grid(cells: list[list[str]]) -> str:
  """Rows of cells, the first a heading, as aligned text."""
  widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])
    for row in cells
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def memory_line(planned: dict, device) -> str:
  """What a compiled step takes of each device, in one line.

  Args:
    planned: `train.step.planned_bytes`.
    device: one of those, which may know how much it has.
  """
  limit = (device.memory_stats() or {}).get("bytes_limit")  # a CPU does not know
  of = f" of {_bytes(limit)}" if limit else ""
  held, rest = planned["arguments"], planned["total"] - planned["arguments"]
  return (
    f"memory: a step takes {_bytes(planned['total'])}{of} of each device, {_bytes(held)} for "
    f"weights, optimizer and batch, {_bytes(rest)} while it runs"
  )


def _bytes(n: int) -> str:
  return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def compiled(r: dict) -> str:
  """What `train.ahead.report` found, as a table for the screen."""
  gb, tf = 1e9, 1e12
  mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
  head = [
    f"{r['topology']}: {r['devices']} devices; {mesh}",
    f"{r['batch']['sequences']} x {r['batch']['length']:,} tokens a step in "
    f"{r['batch']['accumulation']} micro-batches; attention {r['attention']} "
    f"({r['context_parallel']}{', balanced' if r['load_balance'] else ''}), remat {r['remat']}",
  ]
  if "bytes" not in r:
    return "\n".join([*head, f"does not fit: {r['error']}"])
  rows = [(f"memory: {name}", f"{n / gb:10.2f} GB") for name, n in r["bytes"].items()]
  if r["host_bytes"]:
    rows.append(("memory: of the host", f"{r['host_bytes'] / gb:10.2f} GB"))
  rows += [
    ("memory: of the device", f"{r['hbm'] / gb:10.2f} GB  -> "
     + ("fits" if r["fits"] else "does not fit")),
    ("model FLOPs", f"{r['model_flops'] / tf:10.1f} TF  (6N and attention: "
     f"{r['model_flops_6n'] / tf:.1f} TF)"),
    ("compiled: matrix products", f"{r['matmul_flops'] / tf:10.1f} TF"),
    ("compiled: attention kernels", f"{r['kernel_flops'] / tf:10.1f} TF"),
    *((f"{x['kind']} over {'+'.join(x['axes']) or 'none'}",
       f"{x['bytes'] / gb:10.2f} GB  in {x['calls']:,}") for x in r["collectives"]
      if x["bytes"] > gb / 100),
    *_times(r),
    ("lowered and compiled in", f"{r['lower_seconds'] + r['compile_seconds']:10.1f} s"),
  ]  # fmt: skip
  width = max(len(name) for name, _ in rows)
  lines = [f"  {name:<{width}} {value}" for name, value in rows]
  if r["unknown_loops"]:
    lines.append(
      f"  {len(r['unknown_loops'])} loops whose length depends on data (attention "
      f"{r['attention']}) count once in the FLOPs, so there is no time; splash has none"
    )
  return "\n".join([*head, *lines])


def _times(r: dict) -> list[tuple[str, str]]:
  if "seconds" not in r:
    return []
  return [
    ("model / compiled", f"{r['model_share']:10.2f}"),
    *((f"time: {name}", f"{n:10.2f} s") for name, n in r["seconds"].items()),
    ("step, if all overlaps", f"{r['step_seconds']:10.2f} s   bound by {r['bound']}; "
     f"MFU {r['mfu']:.0%}, {r['tokens_per_second']:,.0f} tokens/s"),
  ]  # fmt: skip


def profiled(operations, what: str, unit: str, number: int, seconds: float) -> str:
  """Where the time of a trace went: by part of the model, then the twenty longest operations.

  Args:
    operations: `train.profile.Operation`s.
    what: was traced.
    unit: "step" or "pass".
    number: units traced.
    seconds: that they took on the clock.
  """
  total = sum(x.seconds for x in operations)
  parts: dict[str, Counter] = {}
  for x in operations:
    parts.setdefault(x.part, Counter())[x.direction] += x.seconds
  whole = sum(parts.values(), Counter())
  directions = [d for d in ("forward", "recomputed", "backward") if whole[d]]
  directions *= len(directions) > 1

  def ms(value):
    return f"{1e3 * value / number:,.2f}" if value else ""

  cells = [[f"time of {what}", "share", f"ms a {unit}", *directions]]
  for name, p in sorted(parts.items(), key=lambda x: -x[1].total()) + [("all operations", whole)]:
    cells.append([name, f"{p.total() / total:.1%}", ms(p.total()), *(ms(p[d]) for d in directions)])
  longest = [["from", "part", "operation", f"calls a {unit}", "share"]]
  for x in sorted(operations, key=lambda x: -x.seconds)[:20]:
    scope = re.sub(r"\b(while|body|cond|closed_call|checkpoint)/", "", x.scope) or "-"
    calls, share = f"{x.calls / number:,.0f}", f"{x.seconds / total:.1%}"
    longest.append([scope, x.part, x.name, calls, share])
  clock = f"a {unit} took {1e3 * seconds / number:,.2f} ms; times of threads and devices add up"
  return f"{_grid(cells)}\n{clock}\n\n{_grid(longest)}"
