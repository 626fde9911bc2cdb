"""How far positions go: they are int32, and so are counts of tokens.

JAX makes int32 of wider integers without a word, and 2^31 becomes -2^31. What comes from outside
is therefore checked as it is given, before JAX has it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MOST_TOKENS = 2**31 - 1


def check_tokens(what: str, tokens) -> None:
  """Raises ValueError unless `tokens`, which the error calls `what`, is from 1 to 2^31 - 1."""
  if not tokens >= 1:
    raise ValueError(f"{what} must be at least 1 token, got {tokens}")
  if tokens > MOST_TOKENS:
    raise ValueError(
      f"{what} must be at most {MOST_TOKENS} tokens (2^31 - 1: positions are int32), got {tokens}"
    )


def check_positions(positions) -> jax.Array:
  """Positions as JAX has them, after a look at those whose values are known.

  Args:
    positions: integers of any width, of Python, numpy or JAX. Those that are traced have no values
      yet, and those on the devices of other processes are not here: both are taken as they are.

  Raises:
    ValueError: if they are not integers, or one is negative or above 2^31 - 1.
  """
  known = not any(
    isinstance(x, jax.core.Tracer) or isinstance(x, jax.Array) and not x.is_fully_addressable
    for x in jax.tree.leaves(positions)
  )
  x = np.asarray(jax.device_get(positions)) if known else jnp.asarray(positions)
  huge = x.dtype == object and all(isinstance(p, int) for p in x.flat)  # Python's, past 64 bits
  if not (huge or jnp.issubdtype(x.dtype, jnp.integer)):
    raise ValueError(f"positions must be integers, got {x.dtype}")
  if known and x.size and not (x.min() >= 0 and x.max() <= MOST_TOKENS):
    raise ValueError(
      f"positions must be from 0 to {MOST_TOKENS} (2^31 - 1: they are int32), "
      f"got {x.min() if x.min() < 0 else x.max()}"
    )
  return jnp.asarray(positions)
