"""Quickstart: pretrain a tiny byte-level Llama at 128 tokens, then extend it x8 and compare.

  ./launch/quickstart.sh, or python launch/train.py --config=configs/quickstart.py

Text: the sources of Python's standard library. Untouched, the model breaks past its window; YaRN
with LoRA, and YaRN with LoRA and PSC, hold. A fourth run is PSC's control: LoRA alone with as many
parameters. Minutes on two CPU cores.
"""

from rope_jax import config


def get_config():
  pretrain = _tiny()
  pretrain.train.steps = 700
  pretrain.train.batch_size = 16
  pretrain.train.learning_rate = 3e-3
  pretrain.train.schedule = "cosine"
  pretrain.train.warmup_steps = 40
  pretrain.train.weight_decay = 0.1
  pretrain.train.b2 = 0.95
  pretrain.train.log_every = 50
  pretrain.checkpoint.every = 350

  psc = _adapted()
  psc.rope.phase = "psc"

  # The control: LoRA alone with as many parameters as LoRA r=8 with PSC, at the same alpha / r.
  matched = _adapted()
  matched.lora.rank = 32
  matched.lora.alpha = 64.0

  return config.comparison(
    pretrain=pretrain,
    untouched=_extended(),
    yarn_lora=_adapted(),
    yarn_lora_matched=matched,
    yarn_lora_psc=psc,
  )


def _tiny():
  c = config.base()
  c.tokenizer = "byte"
  c.rope.original_context = c.rope.context = 128
  c.model.num_layers = 4
  c.model.d_model = 144
  c.model.num_heads = c.model.num_kv_heads = 3
  c.model.head_dim = 48
  c.model.d_ff = 400
  c.model.remat = "none"
  return c


def _extended():
  c = _tiny()
  c.init_from = "run:pretrain"
  c.rope.context = 1024
  c.evals.perplexity = config.perplexity(
    lengths=(128, 256, 512, 1024), protocol="truncate", num_samples=64, batch_size=8
  )
  return c


def _adapted():
  c = _extended()
  c.rope.scaling = "yarn"
  c.lora.rank = 8
  c.train.trainable = "adapters"
  c.train.steps = 80
  c.train.batch_size = 4
  c.train.learning_rate = 2e-3
  c.train.warmup_steps = 10
  c.train.log_every = 20
  return c
