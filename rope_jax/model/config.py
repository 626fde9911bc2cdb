"""Everything that fixes the model's shapes and program."""

from __future__ import annotations

import dataclasses

ATTENTION = ("dense", "blockwise")
REMAT = ("none", "full", "attention", "dots")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Hashable; made by `from_config`. rope_jax/config.py explains the keys."""

  vocab_size: int
  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  attention: str = "blockwise"
  block_q: int = 128
  block_k: int = 256
  remat: str = "full"
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_targets: tuple[str, ...] = ("q", "k", "v", "o")
  phase: str = "none"
  psc_calibration: str = "pre"
  psc_init: str = "released"


def from_config(c) -> ModelConfig:
  """The model described by the blocks model, lora and rope of a config."""
  return ModelConfig(
    **c.model.to_dict(),
    lora_rank=c.lora.rank,
    lora_alpha=c.lora.alpha,
    lora_targets=tuple(c.lora.targets),
    phase=c.rope.phase,
    psc_calibration=c.rope.psc.calibration,
    psc_init=c.rope.psc.init,
  )
