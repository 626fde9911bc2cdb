"""Floating-point operations of a training step, for model FLOP utilisation (MFU)."""

from __future__ import annotations

import jax

# Peak bfloat16 FLOP/s of a chip by jax's device_kind (Google Cloud TPU documentation).
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}


def matrix_parameters(m) -> int:
  """Parameters of the base model that take part in a matrix product for every token."""
  attention = m.d_model * m.head_dim * 2 * (m.num_heads + m.num_kv_heads)
  return m.num_layers * (attention + 3 * m.d_model * m.d_ff) + m.d_model * m.vocab_size


def train_flops_per_token(m, length: int, adapter_parameters: int, *, base_is_trained: bool) -> int:
  """FLOPs of the forward and backward pass for a token of a sequence of `length`.

  2 a parameter forward and 2 for the gradient of its input; 2 more for its own gradient if it is
  trained. Causal attention: two products forward, four backward, over half the sequence on
  average. What rematerialisation computes again does not count.

  Args:
    m: a `ModelConfig`.
    length: tokens of a sequence.
    adapter_parameters: trained parameters of lora and phase.
    base_is_trained: whether the base model has gradients of its own.
  """
  attention = m.num_layers * 6 * 2 * (length / 2) * m.num_heads * m.head_dim
  base = (6 if base_is_trained else 4) * matrix_parameters(m)
  return int(base + 6 * adapter_parameters + attention)


def peak_flops() -> float | None:
  """Peak FLOP/s of one device of this machine, or None where it is not known."""
  return PEAK_FLOPS.get(jax.devices()[0].device_kind)
