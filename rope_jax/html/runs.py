"""The table of the runs: their ropes, how long they were trained, and what sets them apart."""

from __future__ import annotations

from html import escape

from rope_jax import report
from rope_jax.html.elements import label, table


def section(facts: dict[str, dict], numbers: dict[str, int]) -> str:
  """The section, or nothing where the workdirs say nothing.

  Args:
    facts: {run: as from `results.facts`}.
    numbers: {run: its number on the page}.
  """
  rows = {run: _facts(f) for run, f in facts.items()}
  shown = [key for key in _facts({}) if any(row[key] for row in rows.values())]
  if not shown:
    return ""
  texts = {k for k in shown if all(isinstance(row[k], str) for row in rows.values())}
  head = "".join(
    f'<th scope="col"{" class=text" * (key in texts)}><button>{key}</button></th>'
    for key in ["run", *shown]
  )
  lines = []
  for run, row in rows.items():
    cells = "".join(
      f'<td data-value="{row[k]!r}">{row[k]:,.10g}</td>'
      if isinstance(row[k], (int, float))
      else f'<td class="text">{escape(row[k])}</td>'
      for k in shown
    )
    lines.append(f'<tr data-run="{numbers[run]}"><th scope="row">{label(run)}</th>{cells}</tr>')
  ropes = "".join(
    f'<dt data-run="{numbers[run]}">{label(run)}</dt><dd data-run="{numbers[run]}">'
    f"{escape(report.described_line(f['rope']).removeprefix('rope: '))}</dd>"
    for run, f in facts.items()
    if "rope" in f
  )
  ropes = ropes and f"<details><summary>Resolved ropes</summary><dl>{ropes}</dl></details>"
  return f"<section><h2>Runs</h2>{table(head, [lines])}{ropes}{_settings(facts, numbers)}</section>"


def _facts(f: dict) -> dict:
  """What the table of runs says of one, as numbers or text; '' where it is not known."""
  rope, run = f.get("rope", {}), f.get("run", {})
  steps = run.get("config", {}).get("train", {}).get("steps", "")
  if steps and f.get("step", steps) < steps:
    steps = f"{f['step']:,} of {steps:,}"
  scaling = rope.get("scaling", "")
  own = " over the checkpoint's own" if rope.get("base") == "checkpoint" else ""
  windows = [rope[k] for k in ("original_context", "context") if k in rope]
  return {
    "rope": "untouched" if scaling == "none" else scaling + own,
    "factor": rope.get("factor", ""),
    "context": " → ".join(f"{n:,}" for n in dict.fromkeys(windows)),
    "phase": rope.get("phase", ""),
    "resonance": {True: "yes", False: "no"}.get(rope.get("resonance"), ""),
    "steps": steps,
    "parameters": run.get("parameters", ""),
    "trained": run.get("trained_parameters", ""),
  }


def _settings(facts: dict[str, dict], numbers: dict[str, int]) -> str:
  """What the configs of the runs do not have in common."""
  configs = {run: _flat(f["run"].get("config", {})) for run, f in facts.items() if "run" in f}
  keys = dict.fromkeys(key for c in configs.values() for key in c)
  differ = [k for k in keys if len({repr(c.get(k)) for c in configs.values()}) > 1]
  if not differ:
    return ""
  head = "".join(f'<th scope="col" data-run="{numbers[run]}">{label(run)}</th>' for run in configs)
  rows = [
    f'<tr><th scope="row">config.{escape(key)}</th>'
    + "".join(
      f'<td data-run="{numbers[run]}">{escape(str(c.get(key, "")))}</td>'
      for run, c in configs.items()
    )
    + "</tr>"
    for key in differ
  ]
  both = table(f'<th scope="col">setting</th>{head}', [rows])
  return f"<details><summary>Settings that differ</summary>{both}</details>"


def _flat(config: dict, prefix: str = "") -> dict:
  out = {}
  for key, value in config.items():
    if isinstance(value, dict):
      out |= _flat(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = value
  return out
