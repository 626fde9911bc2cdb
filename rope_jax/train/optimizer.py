"""AdamW with a warm-up, and global-norm clipping."""

from __future__ import annotations

import jax
import optax


def schedule(t) -> optax.Schedule:
  """Learning rate by step from `config.train`: linear warm-up from 0, then the named schedule."""
  peak, end = t.learning_rate, t.final_learning_rate
  after = max(t.steps - t.warmup_steps, 1)
  main = dict(
    constant=lambda: optax.constant_schedule(peak),
    cosine=lambda: optax.cosine_decay_schedule(peak, after, alpha=end / peak),
    linear=lambda: optax.linear_schedule(peak, end, after),
  )[t.schedule]()
  if not t.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, peak, t.warmup_steps)
  return optax.join_schedules([warmup, main], [t.warmup_steps])


def optimizer(t) -> optax.GradientTransformation:
  """The optimizer of `config.train`. Weight decay spares norms and biases."""

  def decayed(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key != "scale" and not path[-1].key.endswith("_bias"), params
    )

  adamw = optax.adamw(
    schedule(t), b1=t.b1, b2=t.b2, eps=t.eps, weight_decay=t.weight_decay, mask=decayed
  )
  return optax.chain(optax.clip_by_global_norm(t.clip), adamw) if t.clip else adamw
