"""The values of a config by themselves: of the type of their key, finite, and in range of 32 bits.

Checked before anything else is, so that no later check has to think of nan (of which every
comparison is false), of numbers that an int32 or a float32 does not hold, or of text in a list of
numbers. A command line takes all of these, and a config file takes None for any key.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from rope_jax.config import base
from rope_jax.errors import MOST, check
from rope_jax.evals.entries import ENTRIES

LEAST_FLOAT, MOST_FLOAT = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_NUMBER = f"a finite number that float32 holds: 0, or {LEAST_FLOAT:.2g} to {MOST_FLOAT:.2g} in size"
# What tuples hold whose default is empty, by the last part of their key.
_ELEMENTS = dict(bias=str, tasks=str, long_factor=float, short_factor=float, tail=float)
_ROWS = ("long_factor", "short_factor")  # or rows of them, one for each layer


def check_values(c: ConfigDict) -> None:
  """Checks every value of a run's config for itself.

  Args:
    c: a config, whose evaluations are complete.

  Raises:
    ValueError: naming the key, its value and what was expected.
  """
  known = base()
  _block(c, known, "")
  for name, entry in c.evals.items():
    _block(entry, ENTRIES[entry.type](), f"evals.{name}.")
  fitness = c.search.fitness
  _block(fitness, ENTRIES[fitness.type](), "search.fitness.")


def _block(c: ConfigDict, known: ConfigDict, prefix: str) -> None:
  for name in known:
    key = prefix + name
    if key in ("evals", "search.fitness"):  # by their types, which need not be those of the base
      continue
    if name not in c and prefix == "search.fitness.":  # completed when it is used
      continue
    if isinstance(known[name], ConfigDict):
      _block(c[name], known[name], f"{key}.")
    elif c[name] is not None or known[name] is not None:  # None: not given, where that is allowed
      _value(key, c[name], known.get_type(name), known[name])


def _value(key: str, value, kind: type, default) -> None:
  if kind is tuple:
    name = key.rpartition(".")[2]
    element = type(default[0]) if default else _ELEMENTS[name]
    check(isinstance(value, tuple | list), key, value, "a tuple")
    check(_holds(value, element, rows=name in _ROWS), key, value,
          f"a tuple, each of it {_expected(element)}")  # fmt: skip
  else:
    check(_is(value, kind), key, value, _expected(kind))


def _holds(values, kind: type, rows: bool) -> bool:
  return all(_is(x, kind) or rows and isinstance(x, tuple | list) and _holds(x, kind, False)
             for x in values)  # fmt: skip


def _is(value, kind: type) -> bool:
  """Whether a value is of a type, and one that is worked with everywhere."""
  if kind is bool:
    return isinstance(value, bool)
  if kind is str:
    return isinstance(value, str) and "\0" not in value
  if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
    return False
  if kind is int:
    return abs(value) <= MOST
  return value == 0 or LEAST_FLOAT <= abs(value) <= MOST_FLOAT  # False for nan


def _expected(kind: type) -> str:
  return {
    bool: "True or False",
    int: f"a whole number of at most {MOST:,}",
    float: _NUMBER,
    str: "text, without a NUL",
  }[kind]
