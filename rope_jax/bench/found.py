"""Measurements looked up for tables: the best of the repeats."""

from __future__ import annotations

from rope_jax import bench, markdown
from rope_jax.bench import arithmetic
from rope_jax.bench.process import Journal

LABELS = dict(ours="ours", peer="transformers")


class Found:
  """The best of the repeats of each measurement of some settings."""

  def __init__(self, s: bench.Settings, journal: Journal):
    self.settings, self.machine, self.versions = s, journal.machine, journal.versions
    self.rows: dict[str, list[dict]] = {}
    self.dates: list[str] = []
    for spec, repeat in bench.plan(s):
      for row in journal.find(spec):
        if row["repeat"] == repeat:
          self.rows.setdefault(bench.key(spec), []).append(row["result"])
          self.dates.append(row["date"][:10])

  def results(self, spec: dict, side: str = "ours") -> list[dict]:
    """Of the repeats that succeeded."""
    rows = self.rows.get(bench.key(dict(spec, side=side)), [])
    return [row for row in rows if "failed" not in row]

  def least(self, spec: dict, side: str = "ours", field: str = "seconds") -> float | None:
    """The least of a field in all runs of all repeats."""
    values = [row[field] for row in self.results(spec, side) if field in row]
    return min((min(v) if isinstance(v, list) else v for v in values), default=None)

  def failed(self, spec: dict, side: str) -> str:
    rows = self.rows.get(bench.key(dict(spec, side=side)), [])
    return next((row["failed"] for row in rows if "failed" in row), "")

  def peak(self, dtype: str) -> float | None:
    """FLOP/s of our matrix product."""
    spec = bench.matmul(self.settings, dtype)
    seconds = self.least(spec)
    return seconds and 2 * spec["size"] ** 3 / seconds


def table(rows: list[dict[str, str]]) -> str:
  """A table, '' of no rows; columns in which nothing stands are left out."""
  if not rows:
    return ""
  columns = [name for name in rows[0] if any(row[name] for row in rows)]
  return markdown.table(columns, [[row[c] for c in columns] for row in rows])


def pair(found: Found, spec: dict, show, name: str, field: str = "seconds") -> dict[str, str]:
  """Columns of both sides and of their ratio; `show` makes text of the least of the field."""
  values = {side: found.least(spec, side, field) for side in bench.SIDES}
  out = {
    f"{name}, {label}": found.failed(spec, side) if values[side] is None else show(values[side])
    for side, label in LABELS.items()
  }
  both = None not in values.values()
  return out | {f"{name}, ratio": f"{arithmetic.ratio(**values):.2f}" if both else ""}
