"""Which positions a training sequence is given: PoSE, E2-LLM, randomised, CLEX, mixed windows.

Pure functions of a PRNG key, for one sequence; jit and vmap them over a batch. `length` and
`context` are static; `tokens`, how many of the sequence are real, may be traced. Positions past
the real tokens are of no account. The data pipeline applies them by `config.data.positions`.
Sizes by which a position could pass 2^31 - 1 are a ValueError.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rope_jax.rope.limits import check_tokens


def pose(
  key: jax.Array, *, length: int, context: int, tokens: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
  """PoSE: two chunks of a document, the second further on, in the text and in the positions.

  The first chunk has a random 1 .. (n+1)/2 of the n tokens, from the start of the document at
  positions from 0. The second is the rest of the n tokens, from a random place further on, its
  positions shifted by a random 0 .. T - n.

  Args:
    key: PRNG key.
    length: n, tokens of a training sequence.
    context: T, the target context.
    tokens: of the document; `length` if None, and then the text is not skipped. The second chunk
      ends at most there.

  Returns:
    (index [length], positions [length]), int32: which tokens of the document, and where.

  Source: Zhu et al. (arXiv 2309.10400), dwzhu-pku/PoSE `train_pose.py`, which starts the first
  chunk at 0 and draws the shift uniformly.
  """
  _check(length, context)
  split_key, text_key, shift_key = jax.random.split(key, 3)
  tokens = jnp.asarray(length if tokens is None else tokens, jnp.int32)
  n = jnp.minimum(tokens, length)
  split = jax.random.randint(split_key, (), 1, jnp.maximum((n + 1) // 2, 1) + 1)
  skip = jax.random.randint(text_key, (), 0, tokens - n + 1)
  shift = jax.random.randint(shift_key, (), 0, context - n + 1)
  i = jnp.arange(length, dtype=jnp.int32)
  second = i >= split
  return i + jnp.where(second, skip, 0), i + jnp.where(second, shift, 0)


def e2_llm(
  key: jax.Array, *, length: int, context: int, original_context: int
) -> tuple[jax.Array, jax.Array]:
  """E2-LLM: positions (n + t) / g with a random scale g and a random offset t for each sequence.

  g is uniform in 1 .. G with G = ceil(context / original_context); t is uniform such that n + t
  stays within g * original_context: whatever the scale, the model sees the angles that it was
  trained on, at another density. To use with the untouched rope; at inference, position
  interpolation by any factor up to G.

  Args:
    key: PRNG key.
    length: tokens of a training sequence, at most original_context.
    context: the longest context to prepare for.
    original_context: tokens that the base model was trained on.

  Returns:
    (positions [length] int32, fractions [length] float32): whole and fractional part.

  Source: Liu et al. (arXiv 2401.06951), from secondary accounts: no code was found, and the
  distributions of g and t are the plainest that fit them.
  """
  _check(length, original_context)
  scale_key, offset_key = jax.random.split(key)
  most = -(-context // original_context)
  check_tokens(
    "e2_llm: ceil(context / original_context) * original_context", most * original_context
  )
  g = jax.random.randint(scale_key, (), 1, most + 1)
  t = jax.random.randint(offset_key, (), 0, g * original_context - length + 1)
  n = jnp.arange(length, dtype=jnp.int32) + t
  return n // g, (n % g).astype(jnp.float32) / g.astype(jnp.float32)


def randomised(key: jax.Array, *, length: int, context: int) -> jax.Array:
  """Randomised positions: `length` different ones of 0 .. context - 1, in order. [length] int32.

  Source: Ruoss et al. (arXiv 2305.16843); PoSE's ablation `..._randomized`.
  """
  _check(length, context)
  return jnp.sort(jax.random.permutation(key, context)[:length]).astype(jnp.int32)


def clex_time(key: jax.Array, *, max_factor: int) -> jax.Array:
  """CLEX: the length ratio t of a training step, uniform in 1 .. max_factor. int32."""
  check_tokens("clex: max_factor + 1", max_factor + 1)  # the end of what is drawn from
  return jax.random.randint(key, (), 1, max_factor + 1)


def clex(key: jax.Array, time: jax.Array, *, length: int, max_factor: int) -> jax.Array:
  """CLEX: sorted random positions within t times the length, with both ends. [length] int32.

  Args:
    key: PRNG key.
    time: t, from `clex_time`.
    length: tokens of a training sequence, at least 2.
    max_factor: largest t.

  Source: DAMO-NLP-SG/CLEX, `get_random_position_ids`.
  """
  if length < 2:
    raise ValueError(f"clex: length must be at least 2, got {length}")
  check_tokens("clex: max_factor * length", max_factor * length)
  end = time * length - 1
  # Random order of all candidates, those past the end last; the first length - 2 are the sample.
  candidates = jnp.arange(1, max_factor * length - 1, dtype=jnp.int32)
  order = jnp.where(candidates < end, jax.random.uniform(key, candidates.shape), 2.0)
  inner = jnp.sort(candidates[jnp.argsort(order)[: length - 2]])
  return jnp.concatenate([jnp.zeros(1, jnp.int32), inner, end[None].astype(jnp.int32)])


def mixed_windows(segment_ids: jax.Array, *, original_context: int) -> jax.Array:
  """LongRoPE2's mixed windows: which tokens get the original rope, being in a short segment.

  Segments of at most original_context tokens keep the original rope (`Rope.short`), longer ones
  get the rescaled one, in one batch. Source: Shang et al. (arXiv 2502.20082), section 3.3.

  Args:
    segment_ids: [tokens] int32, -1 for padding.
    original_context: L.

  Returns:
    [tokens] bool.
  """
  n = segment_ids.shape[0]
  ids = jnp.where(segment_ids < 0, n, segment_ids)  # padding: a segment of its own
  size = jnp.zeros(n + 1, jnp.int32).at[ids].add(1)
  return (size <= original_context)[ids]


def _check(length: int, context: int) -> None:
  check_tokens("positions: context", context)
  if not 1 <= length <= context:
    raise ValueError(f"positions: length={length} must be from 1 to {context}")
