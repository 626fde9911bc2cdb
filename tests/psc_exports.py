"""Tiny exports with a learned phase, and an oracle for their logits."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rope_jax import rope
from rope_jax.export import modeling_rope_jax

FILE = Path(modeling_rope_jax.__file__)
FAMILIES = dict(llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3", phi3="Phi3")
PRE, POST = (dict(kind="psc", calibration=c) for c in ("pre", "post"))
ROTATION = dict(kind="psc_rotation", bound=2.5)
PHASES = [PRE, POST, ROTATION, dict(kind="psc_rotation", bound=0), dict(PRE, share_heads=True)]
HEADS, KV_HEADS, HEAD_DIM, LAYERS, WINDOW = 4, 2, 8, 2, 7
SIZES = dict(
  vocab_size=61,
  hidden_size=32,
  num_hidden_layers=LAYERS,
  num_attention_heads=HEADS,
  num_key_value_heads=KV_HEADS,
  intermediate_size=48,
  max_position_embeddings=64,
  pad_token_id=None,
  bos_token_id=None,
  eos_token_id=None,
)
# Sliding windows, of all layers or of the last, where the architecture has them.
OPTIONS = dict(
  llama=dict(head_dim=HEAD_DIM),
  mistral=dict(head_dim=HEAD_DIM, sliding_window=WINDOW),
  qwen2=dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
  qwen3=dict(head_dim=HEAD_DIM),
  phi3=dict(sliding_window=WINDOW, original_max_position_embeddings=64),
)


def name_of(value):
  return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


phases = pytest.mark.parametrize("phase", PHASES, ids=name_of)
families = pytest.mark.parametrize("kind", FAMILIES)


@pytest.fixture(autouse=True)
def _modules_cache(monkeypatch, tmp_path_factory):
  """Copies of remote code of the tests, not with the user."""
  cache = str(tmp_path_factory.getbasetemp() / "hf_modules")
  monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)


def parameters(name, partial=1.0):
  base = rope.base(
    head_dim=HEAD_DIM, theta=5000.0, original_context=32, partial_rotary_factor=partial
  )
  if name == "default":
    return dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=partial)
  r = rope.yarn(base, 2.0)
  return rope.to_hf(r if name == "yarn" else rope.resonance(r))["rope_parameters"]


def draw(rng, name, x):
  """Random weights, large enough that all parts matter, the biases and norms of Qwen among them."""
  noise = torch.tensor(0.2 * rng.normal(size=tuple(x.shape)), dtype=torch.float32)
  return 1 + noise if "norm" in name else noise


def phase_tensors(phase, pairs, rng, scale=0.6):
  outputs = pairs if phase["kind"] == "psc_rotation" else HEAD_DIM
  out = {}
  for layer in range(LAYERS):
    for q_or_k, heads in (("q", HEADS), ("k", KV_HEADS)):
      heads = 1 if phase.get("share_heads") else heads
      for part, last in (("up", HEAD_DIM), ("down", outputs)):
        x = torch.tensor(scale * rng.normal(size=(heads, HEAD_DIM, last)), dtype=torch.float32)
        out[f"model.layers.{layer}.self_attn.phase_{q_or_k}.{part}"] = x
  return out


def export(path, kind, phase, rope_type="default", partial=1.0, change=None, dtype=None, **options):
  """Writes path/base, an ordinary checkpoint, and path/export as an exporter would.

  Returns:
    The base model, and the tensors and config.json of the export.
  """
  name = FAMILIES[kind]
  own = parameters(rope_type, partial)
  hf = getattr(transformers, f"{name}Config")(
    **{**SIZES, **OPTIONS[kind], "rope_parameters": own, **options}
  )
  model = getattr(transformers, f"{name}ForCausalLM")(hf).eval()
  rng = np.random.default_rng(0)
  model.load_state_dict({k: draw(rng, k, x) for k, x in model.state_dict().items()})
  model.tie_weights()
  model.save_pretrained(path / "base")
  shutil.copytree(path / "base", path / "export")
  file = path / "export" / "model.safetensors"
  tensors = load_file(file)
  tensors |= phase_tensors(phase, int(HEAD_DIM * partial) // 2, np.random.default_rng(1))
  tensors = {k: x.to(dtype or x.dtype) for k, x in tensors.items()}
  if change:
    change(tensors)
  save_file(tensors, file, metadata=dict(format="pt"))
  config = json.loads((path / "base" / "config.json").read_text())
  config |= dict(
    model_type="rope_jax",
    base_model_type=kind,
    architectures=[f"RopeJax{name}ForCausalLM"],
    auto_map={
      "AutoConfig": f"modeling_rope_jax.RopeJax{name}Config",
      "AutoModel": f"modeling_rope_jax.RopeJax{name}Model",
      "AutoModelForCausalLM": f"modeling_rope_jax.RopeJax{name}ForCausalLM",
    },
    phase=phase,
  )
  (path / "export" / "config.json").write_text(json.dumps(config))
  shutil.copy(FILE, path / "export")
  return model, tensors, config


def loaded(path, auto=transformers.AutoModelForCausalLM, **options):
  return auto.from_pretrained(str(path), trust_remote_code=True, **options)


def logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def zero_up(tensors):
  tensors.update({k: torch.zeros_like(x) for k, x in tensors.items() if k.endswith(".up")})


def oracle(tensors, config, tokens):
  """The logits of any of the architectures, written for itself over the functions of rope_jax."""
  t = {k.removeprefix("model."): jnp.asarray(x.float().numpy()) for k, x in tensors.items()}
  phase, eps = config["phase"], config["rms_norm_eps"]
  cos, sin = rope.cos_sin(rope.from_hf(config), jnp.arange(tokens.shape[1])[None])

  def norm(x, name):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * t[f"{name}.weight"]

  def linear(x, name):
    return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

  def heads(x, at, which):
    x = x.reshape(*x.shape[:2], -1, HEAD_DIM)
    if f"{at}.{which}_norm.weight" in t:
      x = norm(x, f"{at}.{which}_norm")
    two = [t[f"{at}.phase_{which}.{part}"] for part in ("up", "down")]
    if phase["kind"] == "psc_rotation":
      x = rope.psc_rotation(x, *two, bound=phase["bound"] or None)
    elif phase["calibration"] == "pre":
      x = rope.psc(x, *two)
    x = rope.rotate(x, cos, sin)
    return rope.psc(x, *two) if phase.get("calibration") == "post" else x

  x = t["embed_tokens.weight"][tokens]
  for i in range(LAYERS):
    at, h = f"layers.{i}.self_attn", norm(x, f"layers.{i}.input_layernorm")
    if f"{at}.qkv_proj.weight" in t:
      sizes = np.cumsum([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM])
      q, k, v = jnp.split(linear(h, f"{at}.qkv_proj"), sizes, -1)
    else:
      q, k, v = (linear(h, f"{at}.{name}_proj") for name in "qkv")
    q, k = heads(q, at, "q"), heads(k, at, "k")
    v = v.reshape(*v.shape[:2], KV_HEADS, HEAD_DIM)
    k, v = (jnp.repeat(y, HEADS // KV_HEADS, 2) for y in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HEAD_DIM)
    distance = np.arange(tokens.shape[1])[:, None] - np.arange(tokens.shape[1])
    layered = config.get("layer_types")
    slides = layered[i] == "sliding_attention" if layered else config.get("sliding_window")
    seen = (distance >= 0) & (distance < (config["sliding_window"] if slides else np.inf))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    x = x + linear(out.reshape(*out.shape[:2], -1), f"{at}.o_proj")
    at, h = f"layers.{i}.mlp", norm(x, f"layers.{i}.post_attention_layernorm")
    if f"{at}.gate_up_proj.weight" in t:
      gate, up = jnp.split(linear(h, f"{at}.gate_up_proj"), 2, -1)
    else:
      gate, up = linear(h, f"{at}.gate_proj"), linear(h, f"{at}.up_proj")
    x = x + linear(jax.nn.silu(gate) * up, f"{at}.down_proj")
  return norm(x, "norm") @ t.get("lm_head.weight", t["embed_tokens.weight"]).T
