"""GGUF files for tests, written as llama.cpp's converters write them."""

import gguf
import numpy as np

SIZES = dict(
  vocab_size=61, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
)
STORED = {
  "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip
QKV = ("attn_q", "attn_k", "attn_v")


def state(bias=(), qk_norm=False, tie=False, seed=0, **sizes):
  """Random float32 tensors under Hugging Face's names, [out, in]."""
  s = SIZES | sizes
  rng = np.random.default_rng(seed)
  D, E, F, V = s["d_model"], s["head_dim"], s["d_ff"], s["vocab_size"]
  H, K = s["num_heads"] * E, s["num_kv_heads"] * E
  out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  if not tie:
    out["lm_head.weight"] = (V, D)
  for i in range(s["num_layers"]):
    layer = f"model.layers.{i}."
    linears = dict(q=(H, D), k=(K, D), v=(K, D), o=(D, H), gate=(F, D), up=(F, D), down=(D, F))
    for key, shape in linears.items():
      name = f"{layer}{'self_attn' if key in 'qkvo' else 'mlp'}.{key}_proj"
      out[f"{name}.weight"] = shape
      if key in bias:
        out[f"{name}.bias"] = shape[:1]
    norms = ("input_layernorm", "post_attention_layernorm")
    out |= {f"{layer}{name}.weight": (D,) for name in norms}
    if qk_norm:
      out |= {f"{layer}self_attn.{x}_norm.weight": (E,) for x in "qk"}
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in out.items()}


def stored(arch, tensors, **sizes):
  """The same under GGUF's names: q and k of 'llama' permuted, those of 'phi3' fused."""
  s = SIZES | sizes
  out = {}
  for name, x in tensors.items():
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
      heads = s["num_heads"] if "q_proj" in name else s["num_kv_heads"]
      # LlamaModel.permute of conversion/llama.py
      x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2)
      x = x.reshape(tensors[name].shape)
    for theirs, ours in STORED.items():
      name = name.replace(theirs, ours)
    out[name] = x
  if arch == "phi3":
    for i in range(s["num_layers"]):
      parts = {p: out.pop(f"blk.{i}.{p}.weight") for p in (*QKV, "ffn_gate", "ffn_up")}
      out[f"blk.{i}.attn_qkv.weight"] = np.concatenate([parts[p] for p in QKV])
      out[f"blk.{i}.ffn_up.weight"] = np.concatenate([parts["ffn_gate"], parts["ffn_up"]])
  return out


def metadata(arch, **changes):
  """Keys of a small model; a change to None leaves its key out."""
  s = SIZES | {k: changes.pop(k) for k in SIZES if k in changes}
  out = {
    f"{arch}.context_length": 64, f"{arch}.embedding_length": s["d_model"],
    f"{arch}.block_count": s["num_layers"], f"{arch}.feed_forward_length": s["d_ff"],
    f"{arch}.attention.head_count": s["num_heads"],
    f"{arch}.attention.head_count_kv": s["num_kv_heads"],
    f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, f"{arch}.rope.freq_base": 5000.0,
    f"{arch}.rope.dimension_count": s["head_dim"],
  }  # fmt: skip
  if s["head_dim"] * s["num_heads"] != s["d_model"]:
    out |= {f"{arch}.attention.{x}_length": s["head_dim"] for x in ("key", "value")}
  out |= {k.replace("ARCH", arch): v for k, v in changes.items()}
  return {k: v for k, v in out.items() if v is not None}


def write(path, arch="llama", tensors=None, fields=None, raw=None):
  """Writes a file.

  Args:
    path: of the file.
    arch: general.architecture.
    tensors: stored name -> float array.
    fields: metadata; int, float, bool, str or list.
    raw: stored name -> (uint8 rows, quantisation).
  """
  w = gguf.GGUFWriter(str(path), arch)
  fields = dict(metadata(arch) if fields is None else fields)
  if "general.alignment" in fields:
    w.add_custom_alignment(fields.pop("general.alignment"))
  for key, value in fields.items():
    kinds = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string}
    (w.add_array if isinstance(value, list) else kinds[type(value)])(key, value)
  for name, x in ({} if tensors is None else tensors).items():
    w.add_tensor(name, np.ascontiguousarray(x))
  for name, (x, kind) in (raw or {}).items():
    w.add_tensor(name, x, raw_dtype=kind)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return str(path)
