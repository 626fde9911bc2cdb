"""PyTorch models with a learned phase (PSC), for `transformers` with trust_remote_code=True.

This file travels with the weights: the export copies it next to them, and the package itself never
imports it. It needs torch and transformers only. A checkpoint is that of its base model (one of
`_FAMILIES`) in every key of config.json and every tensor, except:

  config.json (Name: Llama, Mistral, Qwen2, Qwen3 or Phi3)
    model_type: "rope_jax", a type of its own, so that nothing loads it and drops the phase
    base_model_type: "llama", "mistral", "qwen2", "qwen3" or "phi3"
    architectures: ["RopeJax{Name}ForCausalLM"]
    auto_map: {"AutoConfig": "modeling_rope_jax.RopeJax{Name}Config",
               "AutoModel": "modeling_rope_jax.RopeJax{Name}Model",
               "AutoModelForCausalLM": "modeling_rope_jax.RopeJax{Name}ForCausalLM"}
    phase: {"kind": "psc", "calibration": "pre" or "post"}
        or {"kind": "psc_rotation", "bound": radians, 0 for none};
      with "share_heads": true there is one matrix for all heads
  tensors, N for q (attention heads) and k (KV heads), 1 if heads share; d = head_dim
    model.layers.{i}.self_attn.phase_{q,k}.up: [N, d, d], applied first
    model.layers.{i}.self_attn.phase_{q,k}.down: [N, d, d], [N, d, rotated pairs] for psc_rotation
    Parameters that layers share are written for each layer.

The mathematics is that of rope_jax/rope/phase.py; channels are in Hugging Face's half-split layout.
"""

import importlib

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb, eager_attention_forward

_FAMILIES = dict(llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3", phi3="Phi3")
_KEYS = dict(psc={"kind", "calibration"}, psc_rotation={"kind", "bound"})


def _two_layers(x, up, down):
  up, down = (w.expand(x.shape[-2], -1, -1).to(x.dtype) for w in (up, down))
  hidden = nn.functional.silu(torch.einsum("...hd,hdr->...hr", x, up))
  return torch.einsum("...hr,hro->...ho", hidden, down)


def psc_gate(x, up, down):
  """1 + tanh(SiLU(x U_h) D_h) / 2 in (0.5, 1.5), the gain of each channel.

  Args:
    x: [..., heads, head_dim] queries or keys.
    up, down: [heads, head_dim, head_dim]; [1, ...] for all heads.

  Returns:
    The gate, with the shape and dtype of x; computed in float32 after the two products.
  """
  return (1 + 0.5 * torch.tanh(_two_layers(x, up, down).float())).to(x.dtype)


def psc_rotation(x, up, down, bound):
  """Rotates pair i, channels (i, i + pairs), by SiLU(x U_h) D_h, or by bound * tanh of it.

  Args:
    x: [..., heads, head_dim] queries or keys; channels after the first 2 * pairs pass through.
    up: [heads, head_dim, head_dim]; [1, ...] for all heads.
    down: [heads, head_dim, pairs].
    bound: largest angle in radians; None or 0 for none.
  """
  angle = _two_layers(x, up, down).float()
  angle = bound * torch.tanh(angle) if bound else angle
  cos, sin, pairs = angle.cos(), angle.sin(), angle.shape[-1]
  a, b = x[..., : 2 * pairs].float().chunk(2, -1)
  turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
  return torch.cat((turned, x[..., 2 * pairs :]), -1)


class Phase(nn.Module):
  """The learned phase of the queries or of the keys of a layer; the identity while `up` is zero."""

  def __init__(self, config, heads, head_dim):
    super().__init__()
    self.phase = config.phase
    rope = config.rope_parameters
    share = rope.get("partial_rotary_factor") or 1.0
    # 'proportional' lets pairs stand still; all of them are there.
    rotated = head_dim if rope.get("rope_type") == "proportional" else int(head_dim * share)
    outputs = rotated // 2 if self.phase["kind"] == "psc_rotation" else head_dim
    heads = 1 if self.phase.get("share_heads") else heads
    self.up = nn.Parameter(torch.empty(heads, head_dim, head_dim))
    self.down = nn.Parameter(torch.empty(heads, head_dim, outputs))
    self.reset_parameters()

  def reset_parameters(self):
    bound = 1 / self.up.shape[1]
    nn.init.zeros_(self.up)
    nn.init.uniform_(self.down, -bound, bound)

  def before(self, x):
    """[..., heads, head_dim] before the rotation, by content alone."""
    if self.phase["kind"] == "psc_rotation":
      return psc_rotation(x, self.up, self.down, self.phase["bound"])
    return x * psc_gate(x, self.up, self.down) if self.phase["calibration"] == "pre" else x

  def after(self, x):
    """[batch, heads, tokens, head_dim] after the rotation; the gate reads a detached copy."""
    if self.phase.get("calibration") != "post":
      return x
    gate = psc_gate(x.detach().transpose(1, 2), self.up, self.down)
    return x * gate.transpose(1, 2)


class _ConfigMixin:
  def __post_init__(self, **kwargs):
    super().__post_init__(**kwargs)
    if self.base_model_type != type(self)._base_model_type:
      raise ValueError(f"base_model_type={self.base_model_type!r} is not for {type(self).__name__}")
    if self.phase is None:  # transformers makes configs without arguments, to look at defaults
      return
    phase, kind = dict(self.phase), self.phase.get("kind")
    if kind not in _KEYS or set(phase) - {"share_heads"} != _KEYS[kind]:
      raise ValueError(f"phase={phase} must have exactly the keys of one of {_KEYS}")
    if phase.get("calibration", "pre") not in ("pre", "post") or not (phase.get("bound") or 0) >= 0:
      raise ValueError(f"phase={phase}: calibration is 'pre' or 'post', bound is not negative")


class _AttentionMixin:
  """The attention of all families, with the phase where rope_jax/model/llama.py has it.

  Not hooks on q_proj and k_proj: adapters (PEFT) replace those modules, and the phase has to see
  the sum. Keys are kept in the cache calibrated and rotated.
  """

  def __init__(self, config, layer_idx):
    super().__init__(config, layer_idx)
    if config.base_model_type in ("mistral", "phi3"):  # Qwen has a window for each layer
      self.sliding_window = config.sliding_window
    self.phase_q = Phase(config, config.num_attention_heads, self.head_dim)
    self.phase_k = Phase(config, config.num_key_value_heads, self.head_dim)

  def forward(
    self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs
  ):
    if hasattr(self, "qkv_proj"):
      heads = [self.config.num_attention_heads] + 2 * [self.config.num_key_value_heads]
      qkv = self.qkv_proj(hidden_states).split([n * self.head_dim for n in heads], -1)
    else:
      qkv = [project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)]
    q, k, v = (x.view(*hidden_states.shape[:-1], -1, self.head_dim) for x in qkv)
    if hasattr(self, "q_norm"):
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = self.phase_q.before(q), self.phase_k.before(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    q, k = self.phase_q.after(q), self.phase_k.after(k)
    if past_key_values is not None:
      k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
      self.config._attn_implementation, eager_attention_forward
    )
    out, weights = attend(
      self,
      q,
      k,
      v,
      attention_mask,
      dropout=self.attention_dropout if self.training else 0.0,
      scaling=self.scaling,
      sliding_window=getattr(self, "sliding_window", None),
      **kwargs,
    )
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def _make_family(kind, name):
  """The classes RopeJax{name}Config, -Attention, -Model and -ForCausalLM over those of `kind`."""
  modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")

  class Config(_ConfigMixin, getattr(transformers, f"{name}Config")):
    model_type = "rope_jax"
    _base_model_type = kind
    base_model_type: str = kind
    phase: dict | None = None

  class Attention(_AttentionMixin, getattr(modeling, f"{name}Attention")):
    pass

  class Model(getattr(modeling, f"{name}Model")):
    config_class = Config

    def __init__(self, config):
      if getattr(config, "phase", None) is None:
        raise ValueError("the config has no 'phase': load this checkpoint as its base model")
      super().__init__(config)
      for i, layer in enumerate(self.layers):
        layer.self_attn = Attention(config, i)
      self.post_init()

    def _init_weights(self, module):
      super()._init_weights(module)
      if isinstance(module, Phase):
        module.reset_parameters()

  class ForCausalLM(getattr(modeling, f"{name}ForCausalLM")):
    config_class = Config

    def __init__(self, config):
      super().__init__(config)
      self.model = Model(config)
      self.post_init()

  for cls in (Config, Attention, Model, ForCausalLM):
    cls.__name__ = cls.__qualname__ = f"RopeJax{name}{cls.__name__}"
    globals()[cls.__name__] = cls
  # So that save_pretrained copies this file and fills in auto_map, however the class was loaded.
  Config.register_for_auto_class()
  Model.register_for_auto_class("AutoModel")
  ForCausalLM.register_for_auto_class("AutoModelForCausalLM")


for _kind, _name in _FAMILIES.items():
  _make_family(_kind, _name)
