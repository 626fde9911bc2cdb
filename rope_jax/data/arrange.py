"""Positions of training sequences by config.data.positions, a pure function of (seed, sequence)."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.rope import positions
from rope_jax.rope.limits import check_tokens

# Text that PoSE skips over: it cuts documents to five sequences first, as released.
POSE_REACH = 5


class Arrange:
  """What a batch gets besides its tokens.

  Args:
    kind: one of `rope_jax.data.POSITIONS`.
    seed: of the run.
    length: tokens of a sequence.
    context, original_context: of the rope.
    max_factor: of CLEX.

  Raises:
    ValueError: if a position could pass 2^31 - 1.
  """

  def __init__(
    self,
    kind: str,
    *,
    seed: int,
    length: int,
    context: int,
    original_context: int,
    max_factor: int = 1,
  ):
    self.kind, self.length, self.max_factor = kind, length, max_factor
    with _on_host():
      self._key = jax.random.fold_in(jax.random.key(seed), 1)  # not the key of the parameters
    sizes = dict(length=length, context=context)
    draw = dict(
      e2_llm=functools.partial(positions.e2_llm, original_context=original_context, **sizes),
      randomised=lambda key: (positions.randomised(key, **sizes),),
      # One token more: the last target. Its position is of no account.
      pose=lambda key, tokens: positions.pose(
        key, length=length + 1, context=context + 1, tokens=tokens
      ),
    ).get(kind)
    if kind == "clex":

      def draw(key, time):
        return (positions.clex(key, time, length=length, max_factor=max_factor),)

    self._mixed = jax.jit(
      jax.vmap(functools.partial(positions.mixed_windows, original_context=original_context))
    )
    if draw:

      def rows(key, numbers, *extra):
        keys = jax.vmap(functools.partial(_fold_in, key))(*numbers)
        return jax.vmap(draw, in_axes=(0, *(None if x.ndim == 0 else 0 for x in extra)))(
          keys, *extra
        )

      self._draw = jax.jit(rows)
      self._try(draw, dict(pose=POSE_REACH * (length + 1), clex=max_factor).get(kind))

  def _try(self, draw, most: int | None) -> None:
    """What `positions` refuses is refused now, and not in the first step.

    `most`: the largest that is given to `draw` besides the key, if anything is.
    """
    try:
      if most is not None:
        check_tokens("the tokens or the time that it is given", most)
      with _on_host():
        jax.eval_shape(draw, self._key, *(() if most is None else (jnp.int32(most),)))
    except ValueError as error:
      raise ValueError(f"config.data.positions={self.kind!r}: {error}") from None

  def time(self, step: int) -> int:
    """CLEX's t of a training step: the same for all its sequences."""
    with _on_host():
      key = _fold_in(jax.random.fold_in(self._key, 2**31 - 1), *_halves(step))
      return int(positions.clex_time(key, max_factor=self.max_factor))

  def text(self, numbers, tokens) -> tuple[np.ndarray, np.ndarray]:
    """PoSE: (index into the document, positions), each [rows, length + 1].

    Args:
      numbers: of the sequences, counted over the whole run.
      tokens: of their documents.
    """
    with _on_host():
      reach = np.minimum(tokens, POSE_REACH * (self.length + 1))
      out = self._draw(self._key, _halves(numbers), jnp.asarray(reach, jnp.int32))
    return tuple(map(np.asarray, out))

  def __call__(self, batch: dict, step: int, numbers) -> dict:
    """The batch with its positions, fractions or short tokens; numpy in, numpy out."""
    if self.kind in ("sequential", "pose"):
      return batch
    with _on_host():
      if self.kind == "mixed":
        return dict(batch, short=np.asarray(self._mixed(batch["segment_ids"])))
      extra = (jnp.asarray(self.time(step)),) if self.kind == "clex" else ()
      tables = self._draw(self._key, _halves(numbers), *extra)
    # Positions start anew with each document: they index what was drawn for the sequence.
    found = [np.take_along_axis(np.asarray(t), batch["positions"], axis=1) for t in tables]
    return dict(batch, **dict(zip(("positions", "fractions"), found)))


def _halves(numbers) -> tuple[np.ndarray, np.ndarray]:
  """Counts as two uint32, (high, low): JAX has no wider integers, and a long run counts further."""
  numbers = np.asarray(numbers, np.int64)
  return (numbers >> 32).astype(np.uint32), (numbers & 0xFFFFFFFF).astype(np.uint32)


def _fold_in(key, high, low):
  """The key of a number: below 2^32 that of its low half alone, further on one of both halves."""
  upper = jax.random.fold_in(jax.random.fold_in(key, np.uint32(2**32 - 1)), high)
  return jax.random.fold_in(jnp.where(high > 0, upper, key), low)


@contextlib.contextmanager
def _on_host():
  """Beside the accelerators, which are at work on the step before, and outside of their mesh."""
  nowhere = jax.sharding.Mesh(np.empty((), object), ())
  with jax.set_mesh(nowhere), jax.default_device(jax.local_devices(backend="cpu")[0]):
    yield
