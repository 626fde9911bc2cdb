"""Prompts for generation: what a chat model wants around them, and the longest one that fits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rope_jax.errors import check

PLACE = "{prompt}"  # where the prompt goes in a template


def check_template(key: str, template: str) -> None:
  """Raises ValueError unless a template says, once, where the prompt goes."""
  check(template.count(PLACE) == 1, key, template, f"a text with {PLACE!r} in it, once")


def wrap(template: str, prompt: str) -> str:
  """A prompt within its template; other braces mean nothing."""
  return template.replace(PLACE, prompt)


def longest(
  ids: Callable[[int], np.ndarray], limit: int, low: int = 0, guess: int = 0
) -> tuple[int, np.ndarray] | None:
  """The size n >= low whose prompt fits, while that of size n + 1 does not, and this prompt.

  Tokens are nearly linear in the size, so that the bound is approached along a line rather than by
  halves: a prompt of 128k tokens takes half a second to tokenise.

  Args:
    ids: the prompt of a size, as ids; it must grow without end.
    limit: the most tokens.
    low: the smallest size.
    guess: a size that may be near, such as that of the last sample; it only saves time where a
      longer prompt never has fewer tokens.

  Returns:
    (n, ids(n)), or None if not even the smallest fits.
  """
  n, found = low, ids(low)
  if len(found) > limit:
    return None
  least = len(found)
  over, excess = None, 0  # the smallest size that is known not to fit, and by how many tokens
  # Without a guess, the slope is measured on a short prompt.
  at = guess if guess > low else low + max(1, (limit - least) // 32)
  while over is None or over - n > 1:
    tried = ids(at)
    slope = max((len(tried) - least) / (at - low), 0.01)  # tokens for one more of the size
    if len(tried) <= limit:
      n, found = at, tried
    else:
      over, excess = at, len(tried) - limit
    spare = limit - len(found)
    if over is None:
      at = n + max(1, round(spare / slope))
    else:
      at = n + int(spare / slope) if spare <= excess else over - int(excess / slope)
      at = min(max(at, n + 1), over - 1)
  return n, found
