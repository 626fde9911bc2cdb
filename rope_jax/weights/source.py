"""Checkpoints read tensor by tensor, under Hugging Face's names and layout.

A source has `hyperparameters` (the keys of config.model), `rope`, the rope that the model was made
with, and `tensor(name)`, which gives [out, in] matrices for the half-split rotary layout.
"""

from __future__ import annotations

import glob
import json
import os

import numpy as np

from rope_jax import rope as rope_lib
from rope_jax.weights import locate


class HuggingFaceSource:
  """A directory with config.json and safetensors, in one file or in shards with an index."""

  def __init__(self, path: str):
    from safetensors import safe_open

    with open(os.path.join(path, "config.json")) as f:
      hf = json.load(f)
    if hf.get("model_type") != "llama":
      raise ValueError(f"{path}: model_type {hf.get('model_type')!r} is not 'llama'")
    for key in ("attention_bias", "mlp_bias"):
      if hf.get(key):
        raise ValueError(f"{path}: {key} is not supported")
    try:
      self.rope = rope_lib.from_hf(hf)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
    heads = hf["num_attention_heads"]
    self.hyperparameters = dict(
      vocab_size=hf["vocab_size"],
      num_layers=hf["num_hidden_layers"],
      d_model=hf["hidden_size"],
      num_heads=heads,
      num_kv_heads=hf.get("num_key_value_heads") or heads,
      head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
      d_ff=hf["intermediate_size"],
      norm_eps=hf["rms_norm_eps"],
      tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )
    self._file_of = {}
    for file in sorted(glob.glob(os.path.join(path, "*.safetensors"))):
      handle = safe_open(file, framework="np")
      self._file_of |= dict.fromkeys(handle.keys(), handle)
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
      with open(index) as f:
        missing = sorted(set(json.load(f)["weight_map"]) - set(self._file_of))
      if missing:
        raise ValueError(f"{path}: shards are missing, e.g. the one with {missing[0]!r}")
    self.path = path

  def tensor(self, name: str) -> np.ndarray:
    if name not in self._file_of:
      raise ValueError(f"{self.path}: no tensor {name!r}")
    return self._file_of[name].get_tensor(name)


class GGUFSource:
  """A GGUF file of architecture 'llama', dequantised to float32 as it is read."""

  _LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
  }
  _NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
  }

  def __init__(self, path: str):
    import gguf

    self.path = path
    self.reader = gguf.GGUFReader(path)
    self._tensors = {t.name: t for t in self.reader.tensors}
    arch = self.field("general.architecture")
    if arch != "llama":
      raise ValueError(f"{path}: architecture {arch!r} is not supported, only 'llama'")
    heads = self.field("llama.attention.head_count")
    d_model = self.field("llama.embedding_length")
    for unread in ("rope_freqs.weight", "llama.rope.scaling.type"):
      if unread in self._tensors or self.field(unread, "none") != "none":
        raise ValueError(f"{path}: a rope of its own ({unread}) is not read from GGUF files")
    self.hyperparameters = dict(
      vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
      num_layers=self.field("llama.block_count"),
      d_model=d_model,
      num_heads=heads,
      num_kv_heads=self.field("llama.attention.head_count_kv", heads),
      head_dim=self.field("llama.attention.key_length", d_model // heads),
      d_ff=self.field("llama.feed_forward_length"),
      norm_eps=self.field("llama.attention.layer_norm_rms_epsilon"),
      tie_embeddings="output.weight" not in self._tensors,
    )
    self.rope = rope_lib.base(
      head_dim=self.hyperparameters["head_dim"],
      theta=self.field("llama.rope.freq_base", 10_000.0),
      original_context=self.field("llama.context_length"),
    )

  def field(self, name: str, default=None):
    if name not in self.reader.fields:
      if default is None:
        raise ValueError(f"{self.path}: no metadata {name!r}")
      return default
    return self.reader.fields[name].contents()

  def tensor(self, name: str) -> np.ndarray:
    import gguf

    own = self._NAMES.get(name)
    if own is None:
      layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
      own = f"blk.{layer}.{self._LAYER_NAMES[part]}.weight"
    if own not in self._tensors:
      raise ValueError(f"{self.path}: no tensor {own!r}")
    t = self._tensors[own]
    x = gguf.dequantize(t.data, t.tensor_type)
    h = self.hyperparameters
    if own.endswith("attn_q.weight"):
      return _half_split(x, h["num_heads"])
    if own.endswith("attn_k.weight"):
      return _half_split(x, h["num_kv_heads"])
    return x


def open_source(init_from: str) -> HuggingFaceSource | GGUFSource:
  """Opens a Hugging Face directory, a GGUF file or a packaged checkpoint; see `locate`."""
  kind, path = locate(init_from)
  return dict(hf=HuggingFaceSource, gguf=GGUFSource)[kind](path)


def _half_split(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of each head from GGUF's interleaved pairs (2i, 2i+1) to halves (i, i + E/2)."""
  rows = x.shape[0] // heads
  return x.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
