"""config.json and generation_config.json of an export."""

from __future__ import annotations

from rope_jax import resolve
from rope_jax import rope as rope_lib
from rope_jax.weights import families, huggingface

MODELLING = "modeling_rope_jax.py"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model(c, *, phase: bool, freeze: bool) -> dict:
  """config.json of the model of a config, without ids of tokens and dtype.

  Args:
    c: a config.
    phase: whether a learned phase is a part of it.
    freeze: as for `rope.to_hf`.

  Raises:
    ValueError: if there is no such architecture, or it has no such rope.
  """
  rope = resolve.rope(c)
  try:
    found = rope_lib.to_hf(rope, freeze=freeze)
    lists = [found["rope_parameters"].get(k) for k in ("short_factor", "long_factor")]
    out = families.write(c.model, rope.rotary_dim, caches_by_length=lists[0] != lists[1])
    if out["model_type"] == "phi3":
      found = rope_lib.to_hf(rope, freeze=freeze, only=("default", "longrope"))
    out |= found
  except ValueError as error:
    raise ValueError(error if "config." in str(error) else f"config.rope: {error}") from None
  # The same under the keys of earlier readers, which would else run a plain rope without a word.
  parameters = out["rope_parameters"]
  out["rope_theta"] = parameters["rope_theta"]
  out["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
  if rope.rotary_dim != rope.head_dim:
    out["partial_rotary_factor"] = parameters["partial_rotary_factor"]
  if out["model_type"] == "phi3":
    out["original_max_position_embeddings"] = rope.original_context
  if phase and c.rope.phase != "none":
    name = out["architectures"][0].removesuffix("ForCausalLM")
    out["base_model_type"], out["model_type"] = out["model_type"], huggingface.MODEL_TYPE
    out["architectures"] = [f"RopeJax{name}ForCausalLM"]
    out["auto_map"] = auto_map(name)
    out["phase"] = huggingface.phase(c.rope)
  return out


def auto_map(name: str) -> dict:
  """Which classes of the modelling file load a model; `name` is Llama, Mistral, ..."""
  kinds = dict(AutoConfig="Config", AutoModel="Model", AutoModelForCausalLM="ForCausalLM")
  module = MODELLING.removesuffix(".py")
  return {auto: f"{module}.RopeJax{name}{kind}" for auto, kind in kinds.items()}


def family(hf: dict) -> str:
  """The architecture under a config.json of ours."""
  return hf.get("base_model_type", hf["model_type"])


def special_tokens(own: dict, ids: dict) -> dict:
  """Ids of special tokens: the base model's own, which may be several, or the tokenizer's."""
  found = {k: own[k] for k in _TOKENS if k in own}
  return found or dict.fromkeys(_TOKENS) | ids


def generation(own: dict, hf: dict, context: int) -> dict:
  """generation_config.json: the base model's, its longest text raised to the context."""
  if not own:
    return {"_from_model_config": True, **{k: hf[k] for k in _TOKENS if k in hf}}
  longest = own.get("max_length")
  return own | (dict(max_length=max(longest, context)) if isinstance(longest, int) else {})


def load_snippet(*, has_phase: bool, has_tokenizer: bool) -> str:
  """Python that loads the export."""
  code = ", trust_remote_code=True" if has_phase else ""
  names = ["AutoModelForCausalLM", *["AutoTokenizer"] * has_tokenizer]
  lines = [f"from transformers import {', '.join(names)}", ""]
  for name, auto in (("model", names[0]), *(("tokenizer", x) for x in names[1:])):
    lines.append(f'{name} = {auto}.from_pretrained("DIR"{code})')
  return "\n".join(lines)
