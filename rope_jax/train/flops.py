"""Floating-point operations of a training step, for model FLOP utilisation (MFU)."""

from __future__ import annotations

import jax
import numpy as np

from rope_jax.model import context
from rope_jax.train import chips


def matrix_parameters(m) -> int:
  """Parameters of the base model that take part in a matrix product for every token."""
  attention = m.d_model * m.head_dim * 2 * (m.num_heads + m.num_kv_heads)
  return m.num_layers * (attention + 3 * m.d_model * m.d_ff) + m.d_model * m.vocab_size


def train_flops_per_token(m, length: int, adapter_parameters: int, *, base_is_trained: bool) -> int:
  """FLOPs of the forward and backward pass for a token of a sequence of `length`.

  2 a parameter forward and 2 for the gradient of its input; 2 more for its own gradient if it is
  trained. Causal attention: two products forward, four backward, over half the sequence on
  average, less what is before the window. What rematerialisation computes again does not count.

  Args:
    m: a `ModelConfig`.
    length: tokens of a sequence.
    adapter_parameters: trained parameters of lora and phase.
    base_is_trained: whether the base model has gradients of its own.
  """
  keys = length / 2
  if 0 < m.window < length:
    keys -= (length - m.window) ** 2 / (2 * length)
  attention = m.num_layers * 6 * 2 * keys * m.num_heads * m.head_dim
  base = (6 if base_is_trained else 4) * matrix_parameters(m)
  return int(base + 6 * adapter_parameters + attention)


def peak_flops() -> float | None:
  """Peak FLOP/s of one device of this machine, or None where it is not known."""
  chip = chips.by_kind(jax.devices()[0].device_kind)
  return chip and chip.flops


def attention_tiles(
  length: int,
  shards: int,
  *,
  strategy: str,
  balanced: bool,
  block_q: int,
  block_k: int,
  window: int = 0,
) -> float:
  """Scores that a device computes of one head of a sequence, in tokens squared.

  Whole blocks are computed: those with a key that some query of theirs sees. Devices that have
  fewer wait for the busiest, at each hop of a ring.

  Args:
    length: tokens of the sequence.
    shards: devices that share it.
    strategy: 'all_gather' or 'ring'.
    balanced: as in `context.order`.
    block_q, block_k: tokens of a block.
    window: tokens that a token attends to; 0: all up to itself.
  """
  places = context.order(length, shards, balanced).reshape(shards, -1)

  def blocks(queries, keys):
    """Blocks of sorted keys that blocks of these queries see."""
    # Of queries without a window the last of a block sees the most.
    rows = queries.reshape(-1, block_q) if window else queries[block_q - 1 :: block_q, None]
    visible = np.searchsorted(keys, rows, side="right")
    if not window:
      return int(np.ceil(visible / block_k).sum())
    hidden = np.searchsorted(keys, rows - window, side="right")
    total = 0
    for first in range(0, len(keys), block_k):
      seen = (first < visible) & (hidden < first + block_k) & (hidden < visible)
      total += int(seen.any(1).sum())
    return total

  if strategy == "all_gather" or shards == 1:
    tiles = max(blocks(places[i], np.arange(length)) for i in range(shards))
  else:
    tiles = sum(
      max(blocks(places[i], places[(i - hop) % shards]) for i in range(shards))
      for hop in range(shards)
    )
  return float(tiles * block_q * block_k)
