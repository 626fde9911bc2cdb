"""LoRA alone as a directory that the PEFT library loads."""

from __future__ import annotations

from rope_jax.export.origin import Origin

NAME = "adapter_model"  # of the file of weights
ROPE = "rope.json"  # what the base model must be loaded with
_SETTINGS = ("rope_parameters", "max_position_embeddings", "sliding_window", "use_sliding_window",
             "max_window_layers", "layer_types")  # fmt: skip


def check(c, origin: Origin) -> None:
  """Refuses runs that are not LoRA over a checkpoint that others have.

  Raises:
    ValueError: naming the key.
  """
  if not c.lora.rank:
    raise ValueError("config.lora.rank=0: --format=peft is for LoRA, and there is none")
  if c.rope.phase != "none":
    raise ValueError(
      f"config.rope.phase={c.rope.phase!r}: PEFT has no place for it; --format=hf exports it"
    )
  if c.train.trainable != "adapters":
    raise ValueError(
      f"config.train.trainable={c.train.trainable!r}: the base model was trained, too; "
      "--format=hf exports it"
    )
  if not origin.path or origin.retrained:
    why = f"the run {origin.retrained!r} trained it" if origin.retrained else "it is random"
    raise ValueError(
      f"config.init_from={c.init_from!r}: PEFT could load no such base model, since {why}; "
      "--format=hf exports it"
    )
  if origin.hf.get("model_type") == "phi3":
    raise ValueError(
      "config.lora.targets: Phi-3 has one matrix for q, k and v, which PEFT cannot adapt in parts; "
      "--format=hf merges them"
    )


def config(c, base: str) -> dict:
  """adapter_config.json."""
  return dict(
    peft_type="LORA",
    task_type="CAUSAL_LM",
    base_model_name_or_path=base or None,
    r=c.lora.rank,
    lora_alpha=c.lora.alpha,
    lora_dropout=0.0,
    target_modules=sorted(f"{target}_proj" for target in c.lora.targets),
    bias="none",
    fan_in_fan_out=False,
    use_rslora=False,
    use_dora=False,
    init_lora_weights=True,
    inference_mode=True,
    modules_to_save=None,
  )


def base_settings(hf: dict) -> dict:
  """What of a config.json the base model must be loaded with: rope and window."""
  return {k: hf[k] for k in _SETTINGS if k in hf}


def load_snippet(base: str) -> str:
  """Python that loads the base model with the rope of the run, and the adapter."""
  return "\n".join(
    [
      "import json",
      "from peft import PeftModel",
      "from transformers import AutoModelForCausalLM",
      "",
      f'with open("DIR/{ROPE}") as f:',
      "  rope = json.load(f)  # the adapter was trained with it, not with that of the base",
      f'model = AutoModelForCausalLM.from_pretrained("{base or "BASE"}", **rope)',
      'model = PeftModel.from_pretrained(model, "DIR")',
    ]
  )
