"""Quickstart: pretrain a tiny byte-level Llama at 128 tokens, then extend it x8 and compare.

  ./launch/quickstart.sh, or python launch/train.py --config=configs/quickstart.py

Text: the sources of Python's standard library. Untouched, the model breaks past its window; YaRN
with LoRA, and YaRN with LoRA and PSC, hold. A fourth run is PSC's control: LoRA alone with as many
parameters. Minutes on two CPU cores.
"""

from rope_jax import config, presets


def get_config():
  pretrain = presets.tiny()
  pretrain.train.steps = 700
  pretrain.train.batch_size = 16
  pretrain.train.learning_rate = 3e-3
  pretrain.train.schedule = "cosine"
  pretrain.train.warmup_steps = 40
  pretrain.train.weight_decay = 0.1
  pretrain.train.b2 = 0.95
  pretrain.train.log_every = 50
  pretrain.checkpoint.every = 350

  psc = presets.tiny_adapted("run:pretrain")
  psc.rope.phase = "psc"

  # The control: LoRA alone with as many parameters as LoRA r=8 with PSC, at the same alpha / r.
  matched = presets.tiny_adapted("run:pretrain")
  matched.lora.rank = 32
  matched.lora.alpha = 64.0

  return config.comparison(
    pretrain=pretrain,
    untouched=presets.tiny_extended("run:pretrain"),
    yarn_lora=presets.tiny_adapted("run:pretrain"),
    yarn_lora_matched=matched,
    yarn_lora_psc=psc,
  )
