"""Weights and hyperparameters of a GGUF file, under Hugging Face's names and in its layout."""

from __future__ import annotations

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from rope_jax import reading
from rope_jax.weights import families, gguf_rope
from rope_jax.weights.gguf_check import Stored, check

FAMILIES = ("llama", "qwen2", "qwen3", "phi3")  # Mistral's files say 'llama'

_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LINEARS = {
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # qwen3
_BIASED = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
_BIASED |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")

# Metadata besides rope.*, which has a reader of its own: what is used ...
_USED = ("context_length", "embedding_length", "block_count", "feed_forward_length")
_USED += ("attention.head_count", "attention.head_count_kv", "attention.key_length")
_USED += ("attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window")
# ... what says nothing more, and what would change the model unless it has this value.
_WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout")
_NEUTRAL = {
  "expert_count": 0,
  "expert_used_count": 0,
  "attention.causal": True,
  "attention.clamp_kqv": 0,
  "attention.max_alibi_bias": 0,
  "pooling_type": 0,
}


class _Part(NamedTuple):
  """Rows of a stored tensor: all of it, or a projection within a fused one.

  Attributes:
    stored: the tensor.
    start, stop: its rows.
    heads: number of heads whose rows are in the order of interleaved pairs; 0 if none are.
  """

  stored: Stored
  start: int
  stop: int
  heads: int


class GGUFSource:
  """A GGUF file of one of `FAMILIES`, dequantised as it is read.

  Attributes:
    path: of the file.
    family: general.architecture.
    hyperparameters: vocab_size, num_layers, d_model, num_heads, num_kv_heads, head_dim, d_ff,
      norm_eps, tie_embeddings, bias (which of q, k, v, o, gate, up, down have one), qk_norm, window
      (tokens of sliding attention; 0: all).
    rope: the Rope that the model was made with.
    unread: stored names that are not understood: using the model without them would be wrong.
    phase: {}: there is no learned phase in GGUF files.
    dtype: of config.model.param_dtype, that which holds all of it.

  Raises:
    ValueError: naming the file and what is damaged, missing, at odds or not supported.
  """

  def __init__(self, path: str):
    self.path = path
    self.phase, self.dtype = {}, "float32"
    self.header = check(path)
    self.family = self.field("general.architecture")
    if self.family not in FAMILIES:
      raise self._wrong(
        f"architecture {self.family!r} is not supported, only {', '.join(FAMILIES)}"
      )
    self._refuse_unknown()
    heads = self._whole("attention.head_count")
    d_model = self._whole("embedding_length")
    h = self.hyperparameters = dict(
      vocab_size=self._stored("token_embd.weight").shape[0],
      num_layers=self._whole("block_count"),
      d_model=d_model,
      num_heads=heads,
      num_kv_heads=self._whole("attention.head_count_kv", heads),
      head_dim=self._whole("attention.key_length", d_model // heads),
      d_ff=self._whole("feed_forward_length"),
      norm_eps=self._norm_eps(),
      tie_embeddings="output.weight" not in self.header.tensors,
    )
    if self._whole("attention.value_length", h["head_dim"]) != h["head_dim"]:
      raise self._wrong("keys and values of different length are not supported")
    if h["num_layers"] > families.MOST_LAYERS:
      raise self._wrong(f"block_count={h['num_layers']} is above {families.MOST_LAYERS:,}")
    if heads % h["num_kv_heads"]:
      raise self._wrong(f"{heads} heads over {h['num_kv_heads']} KV heads")
    self._parts: dict[str, _Part] = {}
    self.unread = []
    for name, stored in self.header.tensors.items():
      self._understand(name, stored)
    h["bias"] = tuple(k for k, part in _BIASED.items() if self._in_all(_LINEARS[part] + ".bias"))
    q_norm, k_norm = (self._in_all(part + ".weight") for part in _QK_NORMS.values())
    if q_norm != k_norm:
      raise self._wrong("of q_norm and k_norm there is only one")
    h["qk_norm"] = q_norm
    h["window"] = self._whole("attention.sliding_window", 0, least=0)
    try:
      self.rope = gguf_rope.read(
        self.header, h["head_dim"], self._whole("context_length"), self._factors
      )
    except ValueError as error:
      raise self._wrong(str(error)) from error

  def field(self, name: str, default=None):
    """A value of the metadata, `default` if it is not there."""
    return self.header.field(name, default)

  def names(self) -> set[str]:
    """Hugging Face's names of the tensors; fused projections appear one by one."""
    return set(self._parts)

  def shape(self, name: str) -> tuple[int, ...]:
    """[out, in] of a matrix, [out] of a vector."""
    part = self._part(name)
    return (part.stop - part.start, *part.stored.shape[1:])

  def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray:
    """A tensor, or the part of it that `box` selects.

    Args:
      name: one of `names()`.
      box: a slice for each dimension of `shape(name)`; None for all. Only its rows, and of these
        only the blocks that it touches, are dequantised.

    Returns:
      The array: float32 if it is stored quantised, float32, float16 or bfloat16 as stored.

    Raises:
      ValueError: if there is no such tensor, or it cannot be dequantised.
    """
    part, shape = self._part(name), self.shape(name)
    box = (slice(None),) * len(shape) if box is None else tuple(box)
    if len(box) != len(shape) or not all(isinstance(s, slice) for s in box):
      raise ValueError(f"{name}: box={box} must be a slice for each dimension of {shape}")
    rows = np.arange(part.start, part.stop)
    if part.heads:
      rows = _half_split(rows, part.heads)
    rows = rows[box[0]]
    if len(shape) == 1:
      return self._dequantised(name, part.stored, slice(0, 1), slice(None))[0][rows]
    if rows.size and np.array_equal(rows, np.arange(rows[0], rows[0] + rows.size)):
      rows = slice(rows[0], rows[0] + rows.size)  # without a copy
    return self._dequantised(name, part.stored, rows, box[1])

  def _dequantised(self, name: str, t: Stored, rows, columns: slice) -> np.ndarray:
    """Stored rows (a slice or indices) and logical columns; a vector is one row."""
    elements, size = t.block
    data = self.header.data[t.offset : t.offset + t.nbytes]
    data = data.reshape(-1, t.shape[-1] // elements * size)
    wanted = np.arange(t.shape[-1])[columns]
    first = wanted.min() // elements if wanted.size else 0
    last = wanted.max() // elements + 1 if wanted.size else 0
    raw = np.ascontiguousarray(data[rows, first * size : last * size])
    dtype = dict(F32=np.float32, F16=np.float16, BF16=ml_dtypes.bfloat16).get(t.kind)
    if not raw.size:
      return np.empty((raw.shape[0], wanted.size), dtype or np.float32)
    if dtype:
      x = raw.view(dtype)
    else:
      import gguf

      try:
        with np.errstate(invalid="ignore", over="ignore"):  # scales that are not finite
          x = gguf.dequantize(raw, gguf.GGMLQuantizationType[t.kind])
      except Exception as error:  # of the package, whatever it is
        raise self._wrong(f"{name}: {t.kind} cannot be dequantised: {error}") from error
    wanted = wanted - first * elements
    return x if wanted.size == x.shape[1] and columns.step in (None, 1) else x[:, wanted]

  def _understand(self, name: str, stored: Stored) -> None:
    """Finds what a stored tensor is in the model."""
    h = self.hyperparameters
    D, E, F = h["d_model"], h["head_dim"], h["d_ff"]
    H, K = h["num_heads"] * E, h["num_kv_heads"] * E
    if name in _NAMES:
      shape = (D,) if name == "output_norm.weight" else (h["vocab_size"], D)
      return self._assign(name, stored, shape, {_NAMES[name]: shape[0]})
    if name in gguf_rope.TENSORS:
      return None
    match = _LAYER.fullmatch(name)
    if match is None or int(match[1]) >= h["num_layers"]:
      return self.unread.append(name)
    _, part, kind = match.groups()
    layer = f"model.layers.{match[1]}."
    sizes = dict(attn_q=(H, D), attn_k=(K, D), attn_v=(K, D), attn_output=(D, H))
    sizes |= dict(ffn_gate=(F, D), ffn_up=(F, D), ffn_down=(D, F))
    gate_up = f"blk.{match[1]}.ffn_gate.{kind}" not in self.header.tensors
    if part == "attn_qkv":
      inside, columns = ("attn_q", "attn_k", "attn_v"), D
    elif part == "ffn_up" and self.family == "phi3" and gate_up:
      inside, columns = ("ffn_gate", "ffn_up"), D
    elif part in _LINEARS:
      inside, columns = (part,), sizes[part][1]
    elif part in _NORMS and kind == "weight":
      return self._assign(name, stored, (D,), {f"{layer}{_NORMS[part]}.weight": D})
    elif part in _QK_NORMS and kind == "weight" and self.family == "qwen3":
      return self._assign(name, stored, (E,), {f"{layer}{_QK_NORMS[part]}.weight": E})
    else:
      return self.unread.append(name)
    rows = {f"{layer}{_LINEARS[p]}.{kind}": sizes[p][0] for p in inside}
    out = sum(rows.values())
    return self._assign(name, stored, (out, columns) if kind == "weight" else (out,), rows)

  def _assign(self, name: str, stored: Stored, shape: tuple, rows: dict[str, int]) -> None:
    if stored.shape != shape:
      raise self._wrong(f"tensor {name!r} has shape {stored.shape}, the metadata give {shape}")
    start = 0
    for own, count in rows.items():
      if own in self._parts:
        raise self._wrong(f"{own} is there twice, on its own and fused")
      heads = 0
      # The converter of this architecture alone reorders q and k (LlamaModel.permute).
      if self.family == "llama" and own.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        heads = count // self.hyperparameters["head_dim"]
      self._parts[own] = _Part(stored, start, start + count, heads)
      start += count

  def _in_all(self, part: str) -> bool:
    """Whether the layers have this part; all of them or none."""
    layers = sum(name.endswith("." + part) for name in self._parts)
    if layers not in (0, self.hyperparameters["num_layers"]):
      raise self._wrong(f"{layers} of {self.hyperparameters['num_layers']} layers have {part}")
    return bool(layers)

  def _factors(self, name: str) -> np.ndarray | None:
    stored = self.header.tensors.get(name)
    if stored is None:
      return None
    if len(stored.shape) > 1:
      raise self._wrong(f"tensor {name!r} has shape {stored.shape}, not one factor for each pair")
    return self._dequantised(name, stored, slice(0, 1), slice(None))[0]

  def _part(self, name: str) -> _Part:
    if name not in self._parts:
      raise self._wrong(f"no tensor {name!r}")
    return self._parts[name]

  def _stored(self, name: str) -> Stored:
    if name not in self.header.tensors:
      raise self._wrong(f"no tensor {name!r}")
    return self.header.tensors[name]

  def _whole(self, key: str, default: int | None = None, least: int = 1) -> int:
    key = f"{self.family}.{key}"
    value = self.field(key, default)
    if value is None:
      raise self._wrong(f"no metadata {key!r}")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
      raise self._wrong(f"{key}={value!r} must be a whole number of at least {least}, below 2^31")
    return value

  def _norm_eps(self) -> float:
    key = f"{self.family}.attention.layer_norm_rms_epsilon"
    value = self.field(key)
    if not isinstance(value, float) or not 0 <= value < 1:
      raise self._wrong(f"{key}={value!r} must be a number from 0 to 1")
    return value

  def _refuse_unknown(self) -> None:
    if self.field("split.count", 1) not in (0, 1):
      raise self._wrong("one of several files of a model; merge them with llama-gguf-split --merge")
    if self.field("general.type", "model") != "model":
      raise self._wrong(f"general.type={self.field('general.type')!r} is not a model")
    if self.field("general.quantization_version", 2) != 2:
      raise self._wrong("general.quantization_version: only 2 is supported")
    for key in self.header.keys:
      prefix, _, own = key.partition(".")
      if prefix != self.family or own.startswith("rope."):
        continue
      if own in _USED or own in _WITHOUT_EFFECT:
        continue
      if own not in _NEUTRAL or self.field(key) != _NEUTRAL[own]:
        raise self._wrong(f"{key}={self.field(key)!r}: this metadata is not supported")

  def _wrong(self, what: str) -> ValueError:
    return reading.refusal(self.path, what)


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of each head from GGUF's interleaved pairs (2i, 2i+1) to halves (i, i + E/2)."""
  return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
