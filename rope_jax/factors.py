"""LongRoPE factor lists from files, ours and those of others."""

from __future__ import annotations

import csv
import io

from rope_jax import reading

_LARGEST = 1e300  # of a factor; neither infinite nor no number


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
    ValueError: naming the file, if it is not there or holds something else.
  """
  reading.check_plain(path, "no factors to read")
  try:
    text = reading.read_text(path)
    if path.endswith(".json"):
      return _from_json(reading.parse(text))
    rows = [[float(x) for x in row] for row in csv.reader(io.StringIO(text, newline="")) if row]
    if rows and all(len(row) == 1 for row in rows):
      rows = [[row[0] for row in rows]]
    if not rows:
      raise ValueError("the file is empty")
    return dict(long_factor=_plain(rows[0] if len(rows) == 1 else rows))
  except (ValueError, csv.Error) as error:
    what = str(error).removeprefix(f"{path}: ")
    raise reading.refusal(path, f"no factors to read: {what}") from None


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
    raise ValueError(f"these factors were made for {reading.listed(other)}")


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
  if type(start) is not int or not 0 <= start < 2**31 or not isinstance(made_for, dict):
    raise ValueError("expected a whole number as start_tokens and an object as made_for")
  out |= dict(start_tokens=start) if start else {}
  return out | (dict(made_for=made_for) if made_for else {})


def _plain(value) -> tuple:
  """A list of numbers, or of equally long lists of them, one for each layer."""
  if not isinstance(value, list) or not value:
    raise ValueError(f"expected a list of numbers, got {value!r}")
  if not all(isinstance(x, list) for x in value):
    return tuple(map(_number, value))
  rows = tuple(tuple(map(_number, row)) for row in value)
  if len({len(row) for row in rows}) > 1 or not rows[0]:
    raise ValueError(f"expected as many factors in each row, got {[len(row) for row in rows]}")
  return rows


def _number(x) -> float:
  if isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) <= _LARGEST:
    raise ValueError(f"expected a number, got {x!r}")
  return float(x)
