"""Results as data: read from workdirs, and what tables, figures and reports ask of them.

All goes by the form of a result (`rope_jax.evals`); nothing here knows a type of evaluation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable

import numpy as np

from rope_jax import reading
from rope_jax.weights import RUN_FILE

RESULTS_FILE = "results.json"
ROPE_FILE = "results_rope.json"  # the rope under which they are
# Red, yellow, green (sRGB), worst to best: pale enough for dark numbers on them.
COLOURS = ((238, 128, 114), (253, 226, 147), (126, 200, 122))


def read(directories: Iterable[str]) -> tuple[dict[str, dict], dict[str, dict]]:
  """Results and facts of the runs and comparisons in some workdirs, by the name of the run.

  A run is named after its directory; one of a comparison by its own name, with the directory of
  the comparison before it where there are other directories.

  Returns:
    ({run: {evaluation: {column: ...}}}, {run: facts}), the facts as of `facts`.

  Raises:
    ValueError: for a directory without results, or given twice.
  """
  directories = list(directories)
  labels = [os.path.basename(os.path.abspath(d)) for d in directories]
  results, about = {}, {}
  for directory, label in zip(directories, labels):
    label = label if labels.count(label) == 1 else os.path.normpath(directory)
    found = _read(directory)
    if is_comparison(found):
      prefix = "" if len(directories) == 1 else f"{label}/"
      runs = {f"{prefix}{name}": (name, run) for name, run in found.items()}
    else:
      runs = {label: ("", found)}
    for name, (inside, run) in runs.items():
      if name in results:
        raise ValueError(f"{directory}: there are results of {name!r} already; give it only once")
      results[name], about[name] = run, facts(os.path.join(directory, inside))
  return results, about


def is_comparison(results: dict) -> bool:
  """Whether these are {run: {evaluation: ...}}, and not {evaluation: ...} of one run."""
  columns = [c for level in results.values() for c in level.values()]
  return bool(columns) and all("metric" not in c for c in columns)


def facts(directory: str) -> dict:
  """What a workdir says of its run: {"rope": ..., "run": run.json, "step": ...}.

  What is not there is left out; the rope is that of the results, `step` is the newest checkpoint's.

  Raises:
    ValueError: naming the file that is damaged.
  """
  out = {}
  of_results = os.path.lexists(os.path.join(directory, ROPE_FILE))
  for key, name in (("rope", ROPE_FILE if of_results else "rope.json"), ("run", RUN_FILE)):
    if os.path.lexists(path := os.path.join(directory, name)):
      out[key] = reading.read_object(path)
      if not (_is_rope if key == "rope" else _is_run)(out[key]):
        raise reading.refusal(path, "of another version, or damaged")
  checkpoints = os.path.join(directory, "checkpoints")
  steps = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
  steps = [int(name) for name in steps if name.isdigit()]  # others are not whole yet
  return out | ({"step": max(steps)} if steps else {})


def evaluations(results: dict[str, dict]) -> dict[str, dict]:
  """{run: {evaluation: columns}} as {evaluation: {run: columns}}, without what is empty."""
  out: dict[str, dict] = {}
  for run, by_name in results.items():
    for name, by_column in by_name.items():
      if by_column:
        out.setdefault(name, {})[run] = by_column
  return out


def columns(by_run: dict[str, dict]) -> list[str]:
  """All columns of {run: {column: ...}}: lengths by size, others in order."""
  found = list(dict.fromkeys(c for r in by_run.values() for c in r))
  return sorted(found, key=int) if all(c.isdigit() for c in found) else found


def lengths(by_run: dict[str, dict]) -> list[str]:
  """Those of the columns that are lengths in tokens, by size."""
  return sorted((c for c in columns(by_run) if c.isdigit()), key=int)


def mixed(by_run: dict[str, dict]) -> list[str]:
  """The columns in which runs have read different texts, where results say what was read."""
  found = {c: {r[c].get("text") for r in by_run.values() if c in r} for c in columns(by_run)}
  return [c for c, texts in found.items() if len(texts - {None}) > 1]


def tasks(by_run: dict[str, dict]) -> dict[str, dict]:
  """{task: {run: {column: ...}}} of one evaluation."""
  out: dict[str, dict] = {}
  for run, by_column in by_run.items():
    for column, r in by_column.items():
      for task, t in r.get("tasks", {}).items():
        out.setdefault(task, {}).setdefault(run, {})[column] = t
  return out


def parts(by_run: dict[str, dict], key: str) -> dict[str, dict]:
  """{column: {run: parts}} of what has "by_position" or "by_depth", whichever is the key."""
  out: dict[str, dict] = {}
  for column in columns(by_run):
    for run, by_column in by_run.items():
      r = by_column.get(column, {})
      found = [part for part in r.get(key, ()) if r["metric"] in part]
      if found:
        out.setdefault(column, {})[run] = found
  return out


def positions(by_run: dict[str, dict]) -> dict[str, dict]:
  """{column: {run: parts}} by position, of the lengths only the longest that has it."""
  found = parts(by_run, "by_position")
  shorter = [c for c in found if c.isdigit()]
  longest = max(shorter, key=int, default=None)
  return {c: runs for c, runs in found.items() if not c.isdigit() or c == longest}


def interval(r: dict, metric: str | None = None) -> tuple[float, float]:
  """From where to where a value may be: a standard error either way, or its own interval."""
  value = r[metric or r["metric"]]
  error = r.get("stderr", 0.0)
  return r.get("low", value - error), r.get("high", value + error)


def lower_is_better(metric: str) -> bool:
  """Of perplexities, losses and errors; all other values are better higher."""
  words = ("ppl", "perplexity", "nll", "loss", "bits", "error")
  return any(word in metric.lower() for word in words)


def scale(metric: str, values: Iterable[float]) -> str:
  """How values are drawn: 'log' (perplexities), 'share' (all in [0, 1]) or 'linear'."""
  values = list(values)
  if any(word in metric.lower() for word in ("ppl", "perplexity")) and min(values) > 0:
    return "log"
  inside = all(0 <= v <= 1 for v in values)
  return "share" if inside and not lower_is_better(metric) else "linear"


def goodness(metric: str, values: Iterable[float]) -> Callable[[float], float]:
  """A map of values to [0, 1], worst to best: shares are themselves, others by their range."""
  values = [v for v in values if math.isfinite(v)] or [1.0]
  kind = scale(metric, values)
  if kind == "share":
    return lambda v: v
  place = math.log if kind == "log" else float
  low, high = place(min(values)), place(max(values))
  if low == high:
    return lambda v: 1.0
  sign = -1 if lower_is_better(metric) else 1
  return lambda v: min(max(0.5 + sign * ((place(v) - low) / (high - low) - 0.5), 0.0), 1.0)


def best(by_run: dict[str, dict], column: str) -> set[str]:
  """The runs with the best value of a column; none where there is nothing to compare."""
  found = {run: r[column] for run, r in by_run.items() if column in r}
  values = {run: v for run, r in found.items() if not math.isnan(v := r[r["metric"]])}
  if len(values) < 2 or len({r["metric"] for r in found.values()}) > 1:
    return set()
  metric = next(iter(found.values()))["metric"]
  top = (min if lower_is_better(metric) else max)(values.values())
  return {run for run, v in values.items() if v == top}


def _read(directory: str) -> dict:
  path = os.path.join(directory, RESULTS_FILE)
  again = "run launch/train.py or launch/eval.py with this --workdir"
  if not os.path.lexists(path):
    raise ValueError(f"{directory}: there is no {RESULTS_FILE}; {again}")
  try:
    found, why = reading.read_json(path), "a value is not where or what it should be"
  except ValueError as error:
    found, why = None, str(error).removeprefix(f"{path}: ")
  if not _is_results(found):
    raise ValueError(f"{path} is not of this version's form ({why}); {again}")
  return found


def _is_results(found) -> bool:
  """Whether these are {evaluation: {column: result}}, or {run: that}."""
  if not _levels(found, 3):
    return False
  runs = found.values() if is_comparison(found) else [found]
  return all(
    _levels(run, 3)
    and all(_is_column(c) and _is_result(r) for by in run.values() for c, r in by.items())
    for run in runs
  )


def _levels(value, depth: int) -> bool:
  """Whether these are objects within objects, by name."""
  return isinstance(value, dict) and (
    depth == 1 or all(_levels(x, depth - 1) for x in value.values())
  )


def _is_rope(r: dict) -> bool:
  """Whether this is what `resolve.describe` gives, as far as it is shown."""
  names, lengths = ("scaling", "base", "phase"), ("original_context", "context")
  lengths += ("seq_len",) * ("seq_len" in r)
  return (
    all(isinstance(r.get(key), str) for key in names)
    and all(type(r.get(key)) is int for key in lengths)
    and all(reading.is_number(r.get(key)) for key in ("factor", "theta", *lengths))
    and isinstance(r.get("resonance"), bool)
    and _are_numbers(r.get("attention_scale"))
    and _are_numbers(r.get("wavelengths"))
  )


def _are_numbers(value) -> bool:
  """Whether numbers, or nulls for infinite ones, make up an array."""
  if not isinstance(value, list):
    return reading.is_number(value)
  try:
    return np.array(value, np.float64).size > 0 and np.asarray(value).dtype.kind in "ifO"
  except (TypeError, ValueError, OverflowError):
    return False


def _is_run(r: dict) -> bool:
  """Whether this is what a run writes, as far as it is shown."""
  train = _within(_within(r, "config"), "train")
  numbers = [r.get(key, 0) for key in ("parameters", "trained_parameters")]
  return train is not None and all(map(reading.is_number, [*numbers, train.get("steps", 0)]))


def _within(value: dict | None, key: str) -> dict | None:
  """The object under a key, {} if there is none, None if it is something else."""
  found = None if value is None else value.get(key, {})
  return found if isinstance(found, dict) else None


def _is_column(name: str) -> bool:
  """Whether a name that looks like a length is one."""
  return not name.isdigit() or name.isdecimal() and len(name) < 20


def _is_result(r: dict) -> bool:
  """Whether a result has its value, and what else is shown of it is of its kind."""
  metric, tasks = r.get("metric"), r.get("tasks", {})
  positions, depths = r.get("by_position", []), r.get("by_depth", [])
  return (
    isinstance(metric, str)
    and _is_value(r, metric)
    and ("threshold" not in r or reading.is_number(r["threshold"]))
    and _are_parts(positions, metric, ("start", "end"))
    and _are_parts(depths, metric, ("depth",))
    and (
      r.get("show") != "by_position"
      or "by_position" in r
      and all(metric in part for part in positions)
    )
    and _levels(tasks, 2)
    and all(_is_result(task) for task in tasks.values())
  )


def _is_value(r: dict, metric: str) -> bool:
  shown = [metric, *(key for key in ("stderr", "low", "high") if key in r)]
  return all(reading.is_number(r.get(key)) for key in shown) and ("low" in r) == ("high" in r)


def _are_parts(parts, metric: str, places: tuple[str, ...]) -> bool:
  """Whether these are results by position or depth; a part without a value is not shown."""
  return isinstance(parts, list) and all(
    isinstance(part, dict)
    and (metric not in part or _is_value(part, metric))
    and all(reading.is_number(part.get(place)) for place in places)
    for part in parts
  )
