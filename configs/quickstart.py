"""Quickstart: pretrain a tiny byte-level Llama at 128 tokens, then extend it x8 and compare.

  ./launch/quickstart.sh, or python launch/train.py --config=configs/quickstart.py

Text: the sources of Python's standard library. Untouched, the model breaks past its window; YaRN
with LoRA, and YaRN with LoRA and PSC, hold. A fourth run is PSC's control: LoRA alone with as many
parameters. Minutes on two CPU cores.
"""

from rope_jax import config, presets


def get_config():
  psc = presets.tiny_adapted("run:pretrain")
  psc.rope.phase = "psc"

  # The control: LoRA alone with as many parameters as LoRA r=8 with PSC, at the same alpha / r.
  matched = presets.tiny_adapted("run:pretrain")
  matched.lora.rank = 32
  matched.lora.alpha = 64.0

  return config.comparison(
    pretrain=presets.tiny_pretraining(),
    untouched=presets.tiny_extended("run:pretrain"),
    yarn_lora=presets.tiny_adapted("run:pretrain"),
    yarn_lora_matched=matched,
    yarn_lora_psc=psc,
  )
