"""A report of results as one HTML file that needs nothing else: no network, no server.

The form of results is that of `rope_jax.evals`; nothing here knows a type of evaluation. What is
shown is in the HTML itself; page.js only hides runs and sorts rows.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from pathlib import Path

import rope_jax
from rope_jax import results as results_lib
from rope_jax.html import evaluation, runs, svg
from rope_jax.html.elements import label


def write(directories: Iterable[str], path: str) -> None:
  """Writes the report of the runs and comparisons in some workdirs.

  Raises:
    ValueError: for a directory without results.
  """
  directories = list(directories)
  results, facts = results_lib.read(directories)
  text = page(results, facts, title=" | ".join(Path(d).absolute().name for d in directories))
  Path(path).write_text(text, encoding="utf-8")


def page(results: dict[str, dict], facts: dict[str, dict] | None = None, title="Results") -> str:
  """The report.

  Args:
    results: {run: {evaluation: {column: ...}}}, shown in this order.
    facts: {run: what its workdir says}, as from `results.facts`.
    title: of the page.

  Returns:
    HTML with its style and script inside; the same for the same input.
  """
  numbers = {run: i for i, run in enumerate(results)}
  facts = {run: (facts or {}).get(run, {}) for run in results}
  contexts = sorted({f["rope"]["original_context"] for f in facts.values() if "rope" in f})
  script = _file("page.js")
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  # Nothing is loaded from anywhere, and no script runs but ours, whatever a name may contain.
  policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  evaluations = results_lib.evaluations(results)
  body = [
    f"<h1>{escape(title)}</h1>",
    f"<nav>{''.join(_box(run, i) for run, i in numbers.items())}</nav>",
    runs.section(facts, numbers),
    *(evaluation.section(name, by_run, numbers, contexts) for name, by_run in evaluations.items()),
    "" if evaluations else "<p>no evaluations</p>",
    f"<footer>rope_jax {escape(rope_jax.__version__)}</footer>",
  ]
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>
{_file("page.css")}</style>
</head>
<body>
{chr(10).join(filter(None, body))}
<script>{script}</script>
</body>
</html>
"""


def _file(name: str) -> str:
  return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _box(run: str, i: int) -> str:
  """The box that hides a run, which is the legend of the curves, too."""
  return (
    f'<label><input type="checkbox" checked value="{escape(run)}" data-toggle="{i}">'
    f'<svg class="key curve {svg.style(i)}" viewBox="-14 -7 28 14"><path d="M-14 0H14"/>'
    f"{svg.MARKERS[i % 4]}</svg>{label(run)}</label>"
  )
