"""Everything that fixes the model's shapes and program."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

ATTENTION = ("dense", "blockwise", "splash", "splash_interpret")
CONTEXT_PARALLEL = ("all_gather", "ring")
ON_CHANGE = ("recompute", "rotate", "capacity")
REMAT = ("none", "full", "attention", "qkv", "matmuls", "offload")
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
  window: int = 0
  dtype: str = "float32"
  param_dtype: str = "float32"
  attention: str = "blockwise"
  block_q: int = 0  # 0: by the kernel and the shape
  block_k: int = 0
  context_parallel: str = "all_gather"
  load_balance: bool = True
  remat: str = "full"
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_targets: tuple[str, ...] = ("q", "k", "v", "o")
  rotary_dim: int = 0  # rotated channels of a head; 0: all
  phase: str = "none"
  psc_calibration: str = "pre"
  psc_init: str = "released"
  psc_share: str = "none"
  psc_bound: float = 0.0  # of the angles of psc_rotation; 0: none
  clex: tuple = ()  # options of rope.clex_correct, as items


def from_config(c) -> ModelConfig:
  """The model described by the blocks model, lora and rope of a config."""
  psc = c.rope[c.rope.phase] if c.rope.phase != "none" else ConfigDict()
  return ModelConfig(
    **c.model.to_dict(),
    lora_rank=c.lora.rank,
    lora_alpha=c.lora.alpha,
    lora_targets=tuple(c.lora.targets),
    rotary_dim=int(c.model.head_dim * c.rope.partial_rotary_factor),
    phase=c.rope.phase,
    **{f"psc_{key}": value for key, value in psc.items()},
    clex=tuple(c.rope.clex.items()) if c.rope.scaling == "clex" else (),
  )
