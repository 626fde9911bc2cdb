"""Steps that are not finite change nothing; gradient norms out of the ordinary are noticed.

All of it is in the optimizer's state, so a run that is resumed goes on counting where it was.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

WARMUP = 20  # steps before a gradient norm is out of the ordinary
WINDOW = 50  # steps that the running mean of gradient norms reaches back


class GuardState(NamedTuple):
  """State of `guarded`; scalars.

  Attributes:
    skipped, in_a_row: steps that were left out: of all, and the last ones without a break.
    taken: steps that were not.
    norm: running mean of their gradient norms.
    ratio: gradient norm of the last one over that of those before it; 0 in the warm-up.
    inner: state of the optimizer.
  """

  skipped: jax.Array
  in_a_row: jax.Array
  taken: jax.Array
  norm: jax.Array
  ratio: jax.Array
  inner: optax.OptState


def guarded(
  inner: optax.GradientTransformation, max_skipped: int
) -> optax.GradientTransformationExtraArgs:
  """The optimizer, without steps whose loss or gradient norm is not finite.

  Its `update` takes `loss` and `grad_norm` besides. Of such a step nothing changes: no parameter,
  no moment, no step count of the schedule. After more than `max_skipped` of them in a row no step
  is taken any more, so that what there is then is what the last of them started from.

  Args:
    inner: the optimizer.
    max_skipped: steps in a row that may be left out.
  """

  def init(params):
    count, number = jnp.zeros((), jnp.int32), jnp.zeros(())
    return GuardState(count, count, count, number, number, inner.init(params))

  def update(updates, state, params=None, *, loss, grad_norm, **_):
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    stopped = state.in_a_row > max_skipped
    take = finite & ~stopped
    updates, new = inner.update(updates, state.inner, params)
    updates = jax.tree.map(lambda u: jnp.where(take, u, jnp.zeros_like(u)), updates)
    new = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, state.inner)
    seen = state.taken + take
    share = 1 / jnp.clip(seen, 1, WINDOW)
    known = (state.taken >= WARMUP) & (state.norm > 0)
    return updates, GuardState(
      skipped=state.skipped + ~(finite | stopped),
      in_a_row=jnp.where(stopped, state.in_a_row, jnp.where(finite, 0, state.in_a_row + 1)),
      taken=seen,
      norm=jnp.where(take, state.norm + (grad_norm - state.norm) * share, state.norm),
      ratio=jnp.where(take & known, grad_norm / jnp.where(known, state.norm, 1), 0.0),
      inner=new,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def metrics(state: optax.OptState) -> dict[str, jax.Array]:
  """What a step is told of its guard: {} without one."""
  if not isinstance(state, GuardState):
    return {}
  return dict(skipped=state.skipped, in_a_row=state.in_a_row, grad_ratio=state.ratio)
