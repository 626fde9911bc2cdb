"""Llama in Flax Linen: a plain tree of parameters, layers stacked by `nn.scan`.

Three collections: 'params' (the base model), 'lora' (low-rank adapters) and 'phase' (PSC, CLEX),
so that what is trained is a statement about the tree. Sharding does not appear here.

Shape suffixes: B batch, L tokens, D d_model, H query heads, K KV heads, E head_dim, F d_ff,
V vocabulary, R LoRA rank.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rope_jax import rope as rope_lib
from rope_jax.model import attention
from rope_jax.model import cache as cache_lib
from rope_jax.model.config import ModelConfig

_QKV = ("attention", "q", "k", "v")
_MATMULS = (*_QKV, "o", "gate", "up")  # the product `down` is only ever added to the residual

# What the backward pass finds in memory instead of computing it again, by name.
_save = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = dict(
  none=None,  # everything: no rematerialisation
  full=jax.checkpoint_policies.nothing_saveable,  # only the input of each layer
  attention=_save("attention"),
  qkv=_save(*_QKV),
  matmuls=_save(*_MATMULS),
  offload=jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(_MATMULS),
    offload_src="device",
    offload_dst="pinned_host",
  ),
)


class Llama(nn.Module):
  """Decoder from token ids to final hidden states; `unembedding` gives the matrix to logits."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    tokens_BxL,
    rope,
    positions_BxL=None,
    segment_ids_BxL=None,
    fractions_BxL=None,
    short_BxL=None,
    cache=None,
    rope_by_row=False,
  ):
    """Runs the model.

    Args:
      tokens_BxL: int32 token ids; over a mesh with a context axis, in the order of
        `attention.places`.
      rope: `rope_jax.rope.Rope`, traced: changing its numbers does not recompile.
      positions_BxL: int32 positions; 0, 1, ... if None. Attention is causal in the order of the
        sequence, whatever the positions.
      segment_ids_BxL: int32; tokens attend within their segment only. One segment if None.
      fractions_BxL, short_BxL: as in `rope_jax.rope.cos_sin`.
      cache: `rope_jax.model.cache.Cache` of what came before; positions and segments are its own.
      rope_by_row: whether all numbers of the rope have a leading axis [B], a rope for each row.

    Returns:
      hidden_BxLxD in the compute dtype, after the last norm; with a cache, (hidden, new cache).
    """
    cfg = self.config
    if cache is not None:
      positions_BxL = cache.new_positions(tokens_BxL.shape[1])
    if positions_BxL is None:
      places = attention.places(cfg, tokens_BxL.shape[1])
      positions_BxL = jnp.broadcast_to(jnp.asarray(places), tokens_BxL.shape)
    rotary_dim = cfg.rotary_dim or cfg.head_dim
    if rope.rotary_dim != rotary_dim:
      raise ValueError(
        f"rope is for head_dim {rope.rotary_dim}, the model rotates {rotary_dim} channels of "
        f"model.head_dim={cfg.head_dim}"
      )
    by_row = jax.vmap if rope_by_row else lambda f: f
    if cfg.clex:
      params = self._clex_parameters()
      rope = by_row(lambda r: rope_lib.clex_correct(r, params, **_correction(cfg)))(rope)
    tokens = [dict(positions=positions_BxL, fractions=fractions_BxL, short=short_BxL)]
    if cache is not None and not cache.rotated:
      tokens.append(dict(positions=cache.positions()))  # keys are rotated on read
    parts = [r.inv_freq for r in (rope, rope.short) if r is not None]
    layered = any(f.ndim > 1 + rope_by_row and f.shape[rope_by_row] > 1 for f in parts)
    ropes = by_row(lambda r: rope_lib.per_layer(r, cfg.num_layers if layered else 1))(rope)
    ropes = jax.tree.map(lambda x: x.swapaxes(0, 1), ropes) if rope_by_row else ropes

    # Once per forward, in float32: angles must not pass through bfloat16. Layers with frequencies
    # of their own make their own angles: those of all at once would not fit in memory.
    if layered:
      angles = ropes
    else:
      angles = _angles(jax.tree.map(lambda x: x[0], ropes), tokens, rope_by_row)
    shared = {}
    if cfg.phase != "none" and cfg.psc_share in ("layers", "all"):
      heads = dict(psc_q=cfg.num_heads, psc_k=cfg.num_kv_heads)
      shared = {name: _psc_variable(self, name, h) for name, h in heads.items()}
    embedding_VxD = self.param(
      "embedding", nn.initializers.normal(0.02), (cfg.vocab_size, cfg.d_model), cfg.param_dtype
    )
    with jax.named_scope("embedding"):
      x = jnp.take(embedding_VxD, tokens_BxL, axis=0).astype(cfg.dtype)
    block = Block
    if cfg.remat != "none":
      block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
    layers = nn.scan(
      block,
      variable_axes=dict(params=0, lora=0, phase=0),
      split_rngs=dict(params=True),
      in_axes=(0, 0 if layered else nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
      length=cfg.num_layers,
    )
    number = None if cache is None else jnp.arange(cfg.num_layers)
    (x, cache), _ = layers(cfg, rope_by_row, name="layers")(
      (x, cache), number, angles, tokens, shared, segment_ids_BxL
    )
    if not cfg.tie_embeddings:
      self.param(
        "lm_head", nn.initializers.normal(0.02), (cfg.d_model, cfg.vocab_size), cfg.param_dtype
      )
    hidden = RMSNorm(cfg, name="final_norm")(x)
    return hidden if cache is None else (hidden, cache.replace(index=cache.index + x.shape[1]))

  def _clex_parameters(self) -> dict:
    cfg = self.config
    pairs = (cfg.rotary_dim or cfg.head_dim) // 2

    def init():
      return rope_lib.clex_init(self.make_rng("params"), pairs, dict(cfg.clex)["param_factor"])

    return self.variable("phase", "clex", init).value


def unembedding(params: dict) -> jax.Array:
  """[D, V] matrix from hidden states to logits: the head, or the tied embedding transposed."""
  return params["lm_head"] if "lm_head" in params else params["embedding"].T


class Block(nn.Module):
  """Pre-norm attention and SwiGLU, each with a residual."""

  config: ModelConfig
  rope_by_row: bool = False

  @nn.compact
  def __call__(self, carry, layer, angles, tokens, shared, segment_ids):
    x, cache = carry
    if not isinstance(angles, list):
      angles = _angles(angles, tokens, self.rope_by_row)
    out, cache = Attention(self.config, name="attention")(
      RMSNorm(self.config, name="attention_norm")(x), angles, shared, segment_ids, cache, layer
    )
    x = x + out
    x = x + MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
    return (x, cache), None


class Attention(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD, angles, shared, segment_ids, cache, layer):
    cfg = self.config
    D, H, K, E = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    q_BxLxHxE = _linear(self, "q", x_BxLxD, dict(d=D), dict(h=H, e=E))
    k_BxLxKxE = _linear(self, "k", x_BxLxD, dict(d=D), dict(h=K, e=E))
    v_BxLxKxE = _linear(self, "v", x_BxLxD, dict(d=D), dict(h=K, e=E))
    if cfg.qk_norm:
      q_BxLxHxE = RMSNorm(cfg, name="q_norm")(q_BxLxHxE)
      k_BxLxKxE = RMSNorm(cfg, name="k_norm")(k_BxLxKxE)
    psc_q, psc_k = (
      shared.get(name) or (cfg.phase != "none" and _psc_variable(self, name, heads))
      for name, heads in (("psc_q", H), ("psc_k", K))
    )
    q_BxLxHxE = _rotate(cfg, psc_q, _calibrate(cfg, psc_q, q_BxLxHxE), angles[0])
    k_BxLxKxE = _calibrate(cfg, psc_k, k_BxLxKxE)
    if cache is None or cache.rotated:
      k_BxLxKxE = _rotate(cfg, psc_k, k_BxLxKxE, angles[0])
    if cache is not None:
      cache = cache_lib.append(cache, layer, k_BxLxKxE, v_BxLxKxE)
      keys = None
      if not cache.rotated:
        keys = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False)
        keys = _rotate(cfg, psc_k, keys.swapaxes(1, 2), angles[1]).swapaxes(1, 2)
      out_BxLxHxE = cache_lib.attend(cfg, cache, layer, q_BxLxHxE, keys)
    elif self.is_initializing():  # shapes are all that counts, and those of a mesh do not fit
      out_BxLxHxE = q_BxLxHxE
    else:
      out_BxLxHxE = attention.attend(cfg, q_BxLxHxE, k_BxLxKxE, v_BxLxKxE, segment_ids)
    return _linear(self, "o", out_BxLxHxE, dict(h=H, e=E), dict(d=D)), cache


class MLP(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD):
    D, F = self.config.d_model, self.config.d_ff
    gate_BxLxF = _linear(self, "gate", x_BxLxD, dict(d=D), dict(f=F))
    up_BxLxF = _linear(self, "up", x_BxLxD, dict(d=D), dict(f=F))
    return _linear(self, "down", jax.nn.silu(gate_BxLxF) * up_BxLxF, dict(f=F), dict(d=D))


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
    return (x * scale).astype(self.config.dtype)


@jax.named_scope("rotate")
def _angles(rope, tokens: list[dict], by_row: bool) -> list[tuple[jax.Array, jax.Array]]:
  """(cos, sin) by channel of the new tokens and, where `tokens` says so, of those in the cache."""
  of = jax.vmap(rope_lib.cos_sin) if by_row else rope_lib.cos_sin
  return [
    rope_lib.by_channel(
      *of(rope, t["positions"], **{k: v for k, v in t.items() if k != "positions"})
    )
    for t in tokens
  ]


def _calibrate(cfg: ModelConfig, psc, x):
  """What a learned phase does to queries or keys by their content alone, before any rotation."""
  if cfg.phase == "psc_rotation":
    return rope_lib.psc_rotation(x, psc["up"], psc["down"], bound=cfg.psc_bound or None)
  if cfg.phase == "psc" and cfg.psc_calibration == "pre":
    return rope_lib.psc(x, psc["up"], psc["down"])
  return x


@jax.named_scope("rotate")
def _rotate(cfg: ModelConfig, psc, x, angles):
  """Rotates queries or keys; a post-calibration comes after."""
  x = rope_lib.rotate_channels(x, *angles)
  if cfg.phase == "psc" and cfg.psc_calibration == "post":
    # As it stands commented out in the release: the gate reads a detached copy.
    return x * rope_lib.psc_gate(jax.lax.stop_gradient(x), psc["up"], psc["down"])
  return x


def _linear(module: nn.Module, name: str, x: jax.Array, inputs: dict, outputs: dict) -> jax.Array:
  """x W, plus a bias if the model has one there, plus (alpha / rank) x A B if LoRA targets `name`.

  `inputs` and `outputs` map einsum letters to sizes. A starts uniform within 1/sqrt(fan in) and
  B zero, as in PEFT, so the adapter starts as the identity.
  """
  cfg = module.config
  i, o = "".join(inputs), "".join(outputs)
  in_shape, out_shape = tuple(inputs.values()), tuple(outputs.values())
  # Projections into the residual stream start smaller, so that its scale does not grow with depth.
  stddev = 0.02 / math.sqrt(2 * cfg.num_layers) if o == "d" else 0.02
  weight = module.param(name, nn.initializers.normal(stddev), in_shape + out_shape, cfg.param_dtype)
  y = jnp.einsum(f"bl{i},{i}{o}->bl{o}", x, weight.astype(cfg.dtype))
  if name in cfg.bias:
    bias = module.param(f"{name}_bias", nn.initializers.zeros, out_shape, cfg.param_dtype)
    y = y + bias.astype(cfg.dtype)
  if not cfg.lora_rank or name not in cfg.lora_targets:
    return checkpoint_name(y, name)
  bound = 1 / math.sqrt(math.prod(in_shape))

  def init():
    a = jax.random.uniform(
      module.make_rng("params"), (*in_shape, cfg.lora_rank), minval=-bound, maxval=bound
    )
    return dict(a=a, b=jnp.zeros((cfg.lora_rank, *out_shape)))

  lora = module.variable("lora", name, init).value
  with jax.named_scope("lora"):
    down = jnp.einsum(f"bl{i},{i}r->blr", x, lora["a"].astype(cfg.dtype))
    delta = jnp.einsum(f"blr,r{o}->bl{o}", down, lora["b"].astype(cfg.dtype))
  return checkpoint_name(y + (cfg.lora_alpha / cfg.lora_rank) * delta, name)


def _psc_variable(module: nn.Module, name: str, heads: int) -> dict:
  """The parameters of PSC on queries or keys, in the module that owns them."""
  cfg = module.config
  heads = 1 if cfg.psc_share in ("heads", "all") else heads
  pairs = (cfg.rotary_dim or cfg.head_dim) // 2
  outputs = pairs if cfg.phase == "psc_rotation" else cfg.head_dim

  def init():
    key = module.make_rng("params")
    return rope_lib.psc_init(key, heads, cfg.head_dim, cfg.psc_init, outputs)

  return module.variable("phase", name, init).value


def _correction(cfg: ModelConfig) -> dict:
  return {k: v for k, v in cfg.clex if k != "param_factor"}
