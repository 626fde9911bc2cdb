"""LongRoPE factor lists from files, ours and those of others."""

from __future__ import annotations

import csv
import json


def read(path: str) -> dict[str, tuple]:
  """Reads factor lists.

  JSON holds an object with `long_factor` and perhaps `short_factor`, alone or inside the
  `rope_parameters` or `rope_scaling` of a Hugging Face config, or is itself the long list; those
  of launch/search.py also have `start_tokens` and say what rope they were `made_for`. CSV
  holds the long factors: one row (or one column), or one row for each layer.

  Returns:
    {'long_factor': ..., and 'short_factor' where given}: tuples of numbers, or of such tuples;
    'start_tokens' where it is not 0; 'made_for' where given, a dict.

  Raises:
    ValueError: if the file is not there or holds something else.
  """
  try:
    with open(path, newline="") as f:
      if path.endswith(".json"):
        return _from_json(json.load(f))
      rows = [[float(x) for x in row] for row in csv.reader(f) if row]
  except (OSError, ValueError) as error:
    raise ValueError(f"{path}: no factors to read: {error}") from None
  if rows and all(len(row) == 1 for row in rows):
    rows = [[row[0] for row in rows]]
  if not rows:
    raise ValueError(f"{path}: no factors to read: the file is empty")
  return dict(long_factor=_plain(rows[0] if len(rows) == 1 else rows))


def check(found: dict, rope: dict, free: tuple[str, ...] = ()) -> None:
  """Compares what a file says that its factors are for with the rope that is to have them.

  Args:
    found: as `read` returns it.
    rope: the same facts of that rope.
    free: facts that may differ.

  Raises:
    ValueError: naming those that differ.
  """
  facts = {k: v for k, v in found.get("made_for", {}).items() if k in rope and k not in free}
  other = [f"{k}={v!r} (here {rope[k]!r})" for k, v in facts.items() if v != rope[k]]
  if other:
    raise ValueError(f"these factors were made for {', '.join(other)}")


def _from_json(value) -> dict[str, tuple]:
  if isinstance(value, list):
    return dict(long_factor=_plain(value))
  for key in ("rope_parameters", "rope_scaling"):
    if isinstance(value, dict):
      value = value.get(key) or value
  if not isinstance(value, dict) or "long_factor" not in value:
    raise ValueError("expected an object with long_factor, or a list")
  if value.get("attention_factor") is not None:
    raise ValueError(
      f"it has attention_factor={value['attention_factor']}, which would be lost; put it in the "
      "option `attention` of the config and take it out of the file"
    )
  out = {k: _plain(value[k]) for k in ("long_factor", "short_factor") if k in value}
  start, made_for = value.get("start_tokens", 0), value.get("made_for", {})
  if not isinstance(start, int) or not isinstance(made_for, dict):
    raise ValueError("expected a whole number as start_tokens and an object as made_for")
  out |= dict(start_tokens=start) if start else {}
  return out | (dict(made_for=made_for) if made_for else {})


def _plain(value) -> tuple:
  if not isinstance(value, list):
    raise ValueError(f"expected a list of numbers, got {value!r}")
  return tuple(_plain(x) if isinstance(x, list) else float(x) for x in value)
