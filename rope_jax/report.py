"""Results for people: lines and tables on the screen."""

from __future__ import annotations

import numpy as np

from rope_jax import resolve


def rope_line(c) -> str:
  """The resolved rope in one line."""
  r = resolve.describe(c)
  line = f"rope: {r['scaling']} x{r['factor']:g}" if r["scaling"] != "none" else "rope: untouched"
  line += ", resonance" if r["resonance"] else ""
  line += f", phase {r['phase']}" if r["phase"] != "none" else ""
  line += f"; context {r['original_context']:,} -> {r['context']:,}, theta {r['theta']:g}"
  scale, w = np.asarray(r["attention_scale"]), np.array(r["wavelengths"], np.float64)  # None: nan
  line += f", attention scale {scale.min():.4f}"
  line += f" .. {scale.max():.4f}" if scale.min() != scale.max() else ""
  if np.isnan(w).all():
    return line + ", no pair turns"
  line += f", wavelengths {np.nanmin(w):.2f} .. {np.nanmax(w):,.0f} tokens"
  still = np.isnan(w).sum()
  return line + (f", {still} of {w.size} pairs stand still" if still else "")


def table(results: dict[str, dict]) -> str:
  """Perplexity by length, a row for each run and evaluation: {run: {evaluation: {length: ...}}}."""
  rows = [
    (" ".join(filter(None, [run, "" if evaluation == "perplexity" else evaluation])), by_length)
    for run, evaluations in results.items()
    for evaluation, by_length in evaluations.items()
  ]
  lengths = sorted({int(n) for _, by_length in rows for n in by_length})
  if not lengths:
    return "no evaluations"
  cells = [["perplexity at", *(f"{n:,}" for n in lengths)]]
  for name, by_length in rows:
    values = [by_length.get(str(n)) for n in lengths]
    cells.append([name or "-", *(v and f"{v['ppl']:.3f} ± {v['stderr']:.3f}" for v in values)])
  widths = [max(len(row[i] or "") for row in cells) for i in range(len(cells[0]))]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *((x or "").rjust(w) for x, w in zip(row[1:], widths[1:]))])
    for row in cells
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
