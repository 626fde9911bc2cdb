"""Errors that name the key of the config, its value and what was expected."""

from __future__ import annotations


def check(condition, key: str, value, expected: str) -> None:
  """Raises ValueError for config.KEY unless the condition holds."""
  if not condition:
    raise ValueError(f"config.{key}={value!r}: expected {expected}")


def choice(key: str, value, choices) -> None:
  """Raises ValueError for config.KEY unless the value is one of the choices."""
  check(value in choices, key, value, "one of " + ", ".join(map(repr, choices)))
