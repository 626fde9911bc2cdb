"""Sizes of a config that no array holds, though each of its numbers is one that is allowed."""

from __future__ import annotations

from rope_jax.config import train_length
from rope_jax.errors import MOST, check
from rope_jax.rope.rotary import MOST_CHANNELS

MOST_PARAMETERS = 10**13


def check_sizes(c) -> None:
  """Checks products of sizes: parameters, and tokens of a training step.

  Args:
    c: a config whose values are checked one by one.

  Raises:
    ValueError: naming the keys and their values.
  """
  m, t = c.model, c.train
  check(m.head_dim <= MOST_CHANNELS, "model.head_dim", m.head_dim, f"at most {MOST_CHANNELS:,}")
  check(m.num_heads * m.head_dim <= MOST, "model.num_heads", m.num_heads,
        f"at most {MOST // m.head_dim:,} with model.head_dim={m.head_dim}")  # fmt: skip
  total = _parameters(c)
  if total > MOST_PARAMETERS:
    keys = "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff"
    raise ValueError(
      "config.model: " + ", ".join(f"{key}={m[key]}" for key in keys.split())
      + f" and config.lora.rank={c.lora.rank} make {total:,} parameters: expected at most "
      f"{MOST_PARAMETERS:,}"
    )  # fmt: skip
  length = train_length(c)
  check(t.batch_size * length <= MOST, "train.batch_size", t.batch_size,
        f"at most {MOST:,} tokens a step, with {length:,} in a sequence (data.length or "
        "rope.context)")  # fmt: skip


def _parameters(c) -> int:
  """Of the model and its adapters, roughly: linear maps and what comes with them."""
  m, rank = c.model, max(c.lora.rank, 0)
  heads, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
  shapes = [(m.d_model, heads), (m.d_model, keys), (m.d_model, keys), (heads, m.d_model),
            *3 * [(m.d_model, m.d_ff)]]  # fmt: skip
  own = sum(a * b + rank * (a + b) for a, b in shapes)
  phase = 2 * (heads + keys) * m.head_dim * (c.rope.phase != "none")
  return m.num_layers * (own + phase) + 2 * m.vocab_size * m.d_model
