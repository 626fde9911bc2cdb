"""The small Llama of the mini presets: `presets.tiny` with a window of 256 tokens."""

from __future__ import annotations

from ml_collections import ConfigDict

from rope_jax import config, presets

WINDOW, SEEDS = 256, (0, 1, 2)
TOKENS = 4096  # of a training step, whatever the window


def pretraining(seed: int) -> ConfigDict:
  """From scratch on the sources of Python's standard library, 2 million bytes."""
  c = presets.tiny_pretraining(1000)
  c.seed = seed
  c.rope.original_context = c.rope.context = WINDOW
  c.train.batch_size = 8
  c.checkpoint.every = 500
  return c


def extended(seed: int, factor: int, scaling: str) -> ConfigDict:
  """The pretrained model of a seed under a method, not trained further."""
  c = presets.tiny()
  c.seed = seed
  c.init_from = "run:" + base_name(seed)
  c.rope.original_context = WINDOW
  c.rope.context = WINDOW * factor
  c.rope.scaling = scaling
  c.evals.perplexity = config.perplexity(
    lengths=tuple(n for n in (256, 1024, 2048, 4096) if n <= c.rope.context),
    protocol="truncate",
    num_samples=16,
    batch_size=4,
  )
  return c


def adapted(seed: int, factor: int, scaling: str, rank: int = 8, steps: int = 60) -> ConfigDict:
  """`extended` and trained: LoRA on q, k, v, o with alpha / r = 2, at 4,096 tokens a step.

  The rate falls to 0: where it stays, the last few steps alone move perplexity by more than what is
  to be told apart.
  """
  c = extended(seed, factor, scaling)
  c.lora.rank, c.lora.alpha = rank, 2.0 * rank
  c.train.update(
    trainable="adapters",
    steps=steps,
    batch_size=TOKENS // c.rope.context,
    learning_rate=2e-3,
    schedule="linear",
    warmup_steps=10,
    log_every=10,
  )
  return c


def base_name(seed: int) -> str:
  """The run that is pretrained, shared by the claims of a preset."""
  return f"small_s{seed}"
