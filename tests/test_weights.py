import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import config, resolve, rope, weights
from rope_jax.model.config import ModelConfig
from rope_jax.model.llama import Llama, unembedding
from rope_jax.weights import load
from rope_jax.weights.source import open_source

SIZES = dict(vocab_size=61, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48)


def hf_model(tie=False, **options):
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  hf = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    tie_word_embeddings=tie,
    rms_norm_eps=1e-5,
    initializer_range=0.3,
    **{
      **dict(
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters=dict(rope_type="default", rope_theta=5000.0),
      ),
      **options,
    },
  )
  return LlamaForCausalLM(hf).eval().float()


def hf_logits(model, tokens):
  import torch

  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def our_logits(path, tokens, r=None):
  source = open_source(path)
  m, r = Llama(ModelConfig(**source.hyperparameters, block_q=8, block_k=8)), r or source.rope
  abstract = jax.eval_shape(lambda: m.init(jax.random.key(0), jnp.zeros((1, 8), int), r))
  params = load.load_params(path, abstract["params"])
  shapes = [
    jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (params, abstract["params"])
  ]
  assert shapes[0] == shapes[1]
  return jax.jit(m.apply)(dict(params=params), tokens, r) @ unembedding(params)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_hugging_face_directories_give_the_same_logits(tmp_path, tie, shard):
  model = hf_model(tie)
  model.save_pretrained(tmp_path, max_shard_size=shard)
  assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
  tokens = tiny.tokens(2, 30)
  ours = our_logits(str(tmp_path), tokens)
  np.testing.assert_allclose(ours, hf_logits(model, tokens), atol=1e-4)


def test_head_dim_need_not_be_d_model_over_heads(tmp_path):
  model = hf_model(head_dim=12)
  model.save_pretrained(tmp_path)
  ours = our_logits(str(tmp_path), tiny.tokens(1, 20))
  np.testing.assert_allclose(ours, hf_logits(model, tiny.tokens(1, 20)), atol=1e-4)


def test_bfloat16_safetensors_are_read(tmp_path):
  rounded = hf_model().bfloat16()
  rounded.save_pretrained(tmp_path)
  model = hf_model()  # a fresh one: .bfloat16() has rounded the frequencies of the other, too
  model.load_state_dict(rounded.state_dict())
  ours = our_logits(str(tmp_path), tiny.tokens(1, 20))
  np.testing.assert_allclose(ours, hf_logits(model, tiny.tokens(1, 20)), atol=1e-4)


def write_gguf(path, model, tie, **changes):
  """As llama.cpp's converter: q and k permuted for interleaved rotation."""
  w = gguf.GGUFWriter(path, "llama")
  w.add_context_length(64)
  w.add_embedding_length(32)
  w.add_block_count(2)
  w.add_feed_forward_length(48)
  w.add_head_count(4)
  w.add_head_count_kv(2)
  w.add_layer_norm_rms_eps(1e-5)
  w.add_rope_freq_base(5000.0)
  state = {k: v.numpy() for k, v in model.state_dict().items()}

  def interleave(x, heads):
    return x.reshape(heads, 2, x.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)

  names = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers": "blk",
  }  # fmt: skip
  for name, x in state.items():
    if tie and name == "lm_head.weight":
      continue
    if "q_proj" in name or "k_proj" in name:
      x = interleave(x, 4 if "q_proj" in name else 2)
    for theirs, ours in names.items():
      name = name.replace(theirs, ours)
    w.add_tensor(name, np.ascontiguousarray(x))
  for name, x in changes.items():
    w.add_tensor(name, x)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()


@pytest.mark.parametrize("tie", [False, True])
def test_gguf_files_give_the_same_logits(tmp_path, tie):
  model, path = hf_model(tie), str(tmp_path / "m.gguf")
  write_gguf(path, model, tie)
  ours = our_logits(path, tiny.tokens(2, 30))
  np.testing.assert_allclose(ours, hf_logits(model, tiny.tokens(2, 30)), atol=1e-4)


def checkpoint_config(path, **changes):
  c = config.base()
  c.init_from = str(path)
  c.model.update(SIZES, head_dim=8, tie_embeddings=False)
  c.rope.update(theta=5000.0, original_context=64, context=64)
  for key, value in changes.items():
    block, _, name = key.partition("__")
    c[block][name] = value
  return c


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model__d_model=48), "config.model.d_model=48.*32"),
    (dict(model__num_kv_heads=4), "config.model.num_kv_heads=4.*2"),
    (dict(model__tie_embeddings=True), "config.model.tie_embeddings=True.*False"),
    (dict(rope__theta=1e4), "config.rope.theta=10000.0.*5000"),
    (dict(rope__original_context=32), "config.rope.original_context=32.*64"),
  ],
)
def test_a_checkpoint_that_does_not_match_is_refused_by_key(tmp_path, change, message):
  hf_model().save_pretrained(tmp_path)
  load.check(checkpoint_config(tmp_path))
  with pytest.raises(ValueError, match=message):
    load.check(checkpoint_config(tmp_path, **change))


YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=2.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=5000.0, factor=2.0)


@pytest.mark.parametrize(
  "parameters, change, message",
  [
    (YARN, dict(rope__scaling="none", rope__factor=None), "config.rope.scaling='none'.*'yarn'"),
    (YARN, dict(rope__factor=4.0), "config.rope.factor=4.0.*2.0"),
    (YARN, dict(rope__original_context=16), "config.rope.original_context=16.*32"),
    (YARN | dict(beta_fast=16.0), {}, "config.rope.yarn.beta_fast=32.0.*16.0"),
    (LINEAR, dict(rope__scaling="ntk"), "config.rope.scaling='ntk'.*'pi'"),
  ],
)
def test_a_checkpoint_with_a_rope_of_its_own_loses_nothing_of_it(
  tmp_path, parameters, change, message
):
  hf_model(rope_parameters=parameters).save_pretrained(tmp_path)
  same = dict(rope__scaling="yarn" if parameters["rope_type"] == "yarn" else "pi")
  same |= dict(rope__factor=2.0, rope__original_context=32)
  if "beta_fast" not in parameters:
    load.check(checkpoint_config(tmp_path, **same))
  with pytest.raises(ValueError, match=message):
    load.check(checkpoint_config(tmp_path, **(same | change)))


def test_a_dynamic_rope_of_its_own_is_compared_too(tmp_path):
  parameters = dict(rope_type="dynamic", rope_theta=5000.0, factor=2.0)
  hf_model(rope_parameters=parameters).save_pretrained(tmp_path)
  same = dict(rope__scaling="dynamic_ntk", rope__factor=2.0, rope__context=128)
  load.check(checkpoint_config(tmp_path, **same))
  with pytest.raises(ValueError, match="config.rope.factor=4.0.*2.0"):
    load.check(checkpoint_config(tmp_path, **(same | dict(rope__factor=4.0))))


@pytest.mark.parametrize("zeros", [False, True])
def test_exported_lists_are_loaded_again(tmp_path, zeros):
  base = rope.base(head_dim=8, theta=5000.0, original_context=32)
  made = rope.hope(base) if zeros else rope.resonance(rope.yarn(base, 2.0))
  exported = rope.to_hf(made)
  hf_model(**exported).save_pretrained(tmp_path)
  p = exported["rope_parameters"]
  c = checkpoint_config(tmp_path, rope__scaling="longrope", rope__original_context=32)
  c.rope.longrope.attention = str(p["attention_factor"])
  c.rope.longrope.update({k: tuple(p[k]) for k in ("short_factor", "long_factor")})
  c.rope.factor = 1.0 if zeros else None
  load.check(c)
  c.rope.longrope.long_factor = (2.0,) * 4
  with pytest.raises(ValueError, match="would be lost"):
    load.check(c)


def test_a_scaled_checkpoint_is_extended_further_and_runs_in_transformers(tmp_path):
  """YaRN over the llama3 rope of a checkpoint: the export gives the same logits there."""
  llama3 = dict(rope_type="llama3", rope_theta=5000.0, factor=4.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip
  hf_model(rope_parameters=llama3).save_pretrained(tmp_path)
  c = checkpoint_config(tmp_path, rope__base="checkpoint", rope__scaling="yarn", rope__context=128)
  load.check(c)
  r = resolve.rope(c)
  own = rope.from_hf(json.loads((tmp_path / "config.json").read_text()))
  np.testing.assert_array_equal(r.inv_freq, rope.yarn(rope.rebase(own), 2.0).inv_freq)
  exported = hf_model(**rope.to_hf(r))
  tokens = tiny.tokens(2, 30)
  np.testing.assert_allclose(
    our_logits(str(tmp_path), tokens, r), hf_logits(exported, tokens), atol=1e-4
  )
  before = hf_logits(hf_model(rope_parameters=llama3), tokens)
  assert np.abs(hf_logits(exported, tokens) - before).max() > 1e-2
  with pytest.raises(ValueError, match="base='checkpoint' keeps it"):
    load.check(checkpoint_config(tmp_path, rope__scaling="yarn", rope__context=128))
  with pytest.raises(ValueError, match="rope.original_context=32.*64"):
    load.check(checkpoint_config(tmp_path, rope__base="checkpoint", rope__original_context=32))


@pytest.mark.parametrize("older", ["rope_scaling", "rope_theta"])
def test_configs_of_earlier_transformers_are_read(tmp_path, older):
  hf_model().save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  hf = json.loads(file.read_text())
  del hf["rope_parameters"]
  hf["rope_theta"] = 5000.0
  if older == "rope_scaling":
    hf["rope_scaling"] = dict(type="linear", factor=2.0)
  file.write_text(json.dumps(hf))
  own = open_source(str(tmp_path)).rope
  assert own.theta == 5000.0
  assert own.history == ((("pi", dict(factor=2.0)),) if older == "rope_scaling" else ())


def test_a_missing_shard_is_named(tmp_path):
  hf_model().save_pretrained(tmp_path, max_shard_size="10KB")
  sorted(tmp_path.glob("*.safetensors"))[0].unlink()
  with pytest.raises(ValueError, match="shards are missing"):
    open_source(str(tmp_path))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="gpt2"), "gpt2"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (dict(quantization_config=dict(bits=4)), "quantization_config"),
    (dict(num_hidden_layers="2"), "num_hidden_layers='2'"),
    (dict(num_attention_heads=0), "num_attention_heads=0"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings='no'"),
    (dict(rms_norm_eps=None), "rms_norm_eps=None"),
    (dict(num_key_value_heads=3), "multiple of num_key_value_heads=3"),
  ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
  hf_model().save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(ValueError, match=message):
    open_source(str(tmp_path))


def test_pickled_checkpoints_are_not_read(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match="safetensors.*pickle"):
    weights.locate(str(tmp_path))


def test_a_missing_checkpoint_is_named(tmp_path):
  with pytest.raises(ValueError, match="no such checkpoint"):
    weights.locate(str(tmp_path / "nothing"))
  with pytest.raises(ValueError, match="config.json"):
    weights.locate(str(tmp_path))


def test_a_tensor_of_another_size_is_refused(tmp_path):
  hf_model().save_pretrained(tmp_path)
  m = Llama(ModelConfig(**SIZES, head_dim=16))
  r = rope.base(head_dim=16, theta=5000.0, original_context=64)
  abstract = jax.eval_shape(lambda: m.init(jax.random.key(0), jnp.zeros((1, 8), int), r))
  with pytest.raises(ValueError, match="k_proj.weight has shape"):
    load.load_params(str(tmp_path), abstract["params"])
