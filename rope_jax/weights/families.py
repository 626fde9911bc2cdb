"""The architectures of Hugging Face that are ours, too: their config.json to config.model and back.

One model computes all of them: Llama, with biases (Qwen2), norms of queries and keys (Qwen3) and a
window (Mistral, Phi-3). Facts and defaults: the configuration files of transformers 5.23.
"""

from __future__ import annotations

from rope_jax.model.config import LINEARS

QKV, ATTENTION, MLP = LINEARS[:3], LINEARS[:4], LINEARS[4:]

# What transformers takes where config.json is silent, by model_type.
_DEFAULTS = dict(
  llama={},
  mistral=dict(num_key_value_heads=8, sliding_window=4096),
  qwen2=dict(num_key_value_heads=32, sliding_window=4096, max_window_layers=28),
  qwen3=dict(
    num_key_value_heads=32, head_dim=128, sliding_window=4096, max_window_layers=28
  ),
  phi3={},
)  # fmt: skip
FAMILIES = tuple(_DEFAULTS)
MOST_LAYERS = 10_000  # a number that is no model's must not be counted up to

# Keys that change what a model computes in ways that are not ours; None, False, 0 and {} are fine.
_FOREIGN = (
  "quantization_config",
  "dual_chunk_attention_config",
  "attn_logit_softcapping",
  "final_logit_softcapping",
  "num_experts",
  "num_local_experts",
  "no_rope_layers",
  "attention_sinks",
)


def read(hf: dict) -> dict:
  """The keys of config.model, as far as they are the model's, from a config.json.

  Raises:
    ValueError: for an architecture or a value that our model does not compute.
  """
  family = hf.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type {family!r} is not supported; these are: {', '.join(FAMILIES)}")
  for key in _FOREIGN:
    if hf.get(key):
      raise ValueError(f"{key}={hf[key]!r} is not supported")
  if hf.get("hidden_act", "silu") != "silu":
    raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported, only 'silu'")
  # A default is for what is absent; null has a meaning of its own, that of the next line or none.
  hf = {k: v for k, v in {**_DEFAULTS[family], **hf}.items() if v is not None or "window" in k}
  heads = _whole(hf, "num_attention_heads")
  hf.setdefault("num_key_value_heads", heads)
  d_model, layers = _whole(hf, "hidden_size"), _whole(hf, "num_hidden_layers")
  if layers > MOST_LAYERS:
    raise ValueError(f"num_hidden_layers={layers}: expected at most {MOST_LAYERS:,}")
  out = dict(
    vocab_size=_whole(hf, "vocab_size"),
    num_layers=layers,
    d_model=d_model,
    num_heads=heads,
    num_kv_heads=_whole(hf, "num_key_value_heads"),
    head_dim=_whole(hf, "head_dim") if "head_dim" in hf else d_model // heads,
    d_ff=_whole(hf, "intermediate_size"),
    norm_eps=_number(hf, "rms_norm_eps"),
    tie_embeddings=_flag(hf, "tie_word_embeddings"),
    bias=_bias(hf, family),
    qk_norm=family == "qwen3",
    window=_window(hf, family, layers),
  )
  if heads % out["num_kv_heads"]:
    raise ValueError(
      f"num_attention_heads={heads} is not a multiple of num_key_value_heads={out['num_kv_heads']}"
    )
  return out


def write(m, rotary_dim: int, *, caches_by_length: bool = False) -> dict:
  """config.json of the architecture that computes a model, all but its rope.

  Args:
    m: config.model, or anything with its keys as attributes.
    rotary_dim: channels of a head that are rotated.
    caches_by_length: whether the rope changes with the length of the text: then Phi-3 if it fits,
      which computes its cache of keys again when that happens.

  Raises:
    ValueError: if no architecture has all that this model has.
  """
  family = _family(m, rotary_dim, caches_by_length)
  out = dict(
    model_type=family,
    architectures=[CLASSES[family]],
    vocab_size=m.vocab_size,
    hidden_size=m.d_model,
    intermediate_size=m.d_ff,
    num_hidden_layers=m.num_layers,
    num_attention_heads=m.num_heads,
    num_key_value_heads=m.num_kv_heads,
    head_dim=m.head_dim,
    hidden_act="silu",
    rms_norm_eps=m.norm_eps,
    tie_word_embeddings=m.tie_embeddings,
    attention_dropout=0.0,
    initializer_range=0.02,
    use_cache=True,
  )
  if family in ("llama", "qwen3"):
    out["attention_bias"] = "q" in m.bias
  if family == "llama":
    out["mlp_bias"] = "up" in m.bias
  if family in ("mistral", "phi3"):
    out["sliding_window"] = m.window or None
  if family in ("qwen2", "qwen3"):
    kind = "sliding_attention" if m.window else "full_attention"
    out |= dict(use_sliding_window=bool(m.window), sliding_window=m.window or None)
    out |= dict(max_window_layers=0 if m.window else m.num_layers)
    out["layer_types"] = [kind] * m.num_layers
  return out


CLASSES = dict(
  llama="LlamaForCausalLM",
  mistral="MistralForCausalLM",
  qwen2="Qwen2ForCausalLM",
  qwen3="Qwen3ForCausalLM",
  phi3="Phi3ForCausalLM",
)


def _family(m, rotary_dim: int, caches_by_length: bool) -> str:
  """The plainest architecture with the biases, norms, window and rotation of a model."""
  bias, plain_heads = set(m.bias), m.d_model == m.num_heads * m.head_dim
  has = dict(
    llama=not m.qk_norm
    and not m.window
    and rotary_dim == m.head_dim
    and m.d_model % m.num_heads == 0
    and bias in (set(), set(ATTENTION), set(MLP), set(LINEARS)),
    mistral=not m.qk_norm and rotary_dim == m.head_dim and not bias,
    qwen2=not m.qk_norm and rotary_dim == m.head_dim and bias == set(QKV),
    qwen3=m.qk_norm and rotary_dim == m.head_dim and bias in (set(), set(ATTENTION)),
    phi3=not m.qk_norm and not bias and plain_heads,
  )
  if caches_by_length and has["phi3"]:
    return "phi3"
  for family, fits in has.items():
    if fits:
      return family
  raise ValueError(
    f"config.model: no architecture of transformers has bias={tuple(m.bias)}, "
    f"qk_norm={m.qk_norm}, window={m.window} and {rotary_dim} of {m.head_dim} channels rotated"
  )


def _bias(hf: dict, family: str) -> tuple[str, ...]:
  if family == "qwen2":
    return QKV
  out = ATTENTION if _flag(hf, "attention_bias") and family in ("llama", "qwen3") else ()
  return out + MLP if _flag(hf, "mlp_bias") and family == "llama" else out


def _window(hf: dict, family: str, layers: int) -> int:
  """Tokens of the sliding window that all layers have, or 0."""
  if family == "llama" or hf.get("sliding_window") is None:
    return 0
  window = _whole(hf, "sliding_window")
  if family in ("qwen2", "qwen3"):
    if not _flag(hf, "use_sliding_window"):
      return 0
    first = hf["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int):
      raise ValueError(f"max_window_layers={first!r}: expected a whole number")
    kinds = _layer_types(hf) or [
      "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
  else:
    kinds = _layer_types(hf) or ["sliding_attention"]
  if len(set(kinds)) > 1:
    raise ValueError("layer_types: a window in some layers only is not supported")
  return window if kinds[0] == "sliding_attention" else 0


def _layer_types(hf: dict) -> list[str]:
  value = hf.get("layer_types") or []
  if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
    raise ValueError(f"layer_types={value!r}: expected a list of names")
  return value


def _whole(hf: dict, key: str) -> int:
  value = hf.get(key)
  if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
    raise ValueError(f"{key}={value!r}: expected a positive whole number")
  return value


def _number(hf: dict, key: str) -> float:
  value = hf.get(key)
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
    raise ValueError(f"{key}={value!r}: expected a number between 0 and 1")
  return float(value)


def _flag(hf: dict, key: str) -> bool:
  value = hf.get(key, False)
  if not isinstance(value, bool):
    raise ValueError(f"{key}={value!r}: expected true or false")
  return value
