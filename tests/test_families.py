"""Every family that we read: in from transformers, out to transformers, bit for bit in between."""

import json

import jax
import numpy as np
import pytest
import tiny
from test_weights import hf_logits

from rope_jax import config, export, presets, resolve
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama, unembedding
from rope_jax.train import state
from rope_jax.weights import families, names
from rope_jax.weights.source import open_source

PLAIN = dict(rope_type="default", rope_theta=5000.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip
LONGROPE = dict(rope_type="longrope", rope_theta=5000.0, short_factor=[1.0] * 4, factor=4.0,
                long_factor=[1.0, 1.5, 2.0, 4.0], original_max_position_embeddings=16)  # fmt: skip

# Name -> (class, options of its config).
MODELS = dict(
  llama=("Llama", {}),
  llama_31=("Llama", dict(rope_parameters=LLAMA3)),
  llama_biased=("Llama", dict(attention_bias=True, mlp_bias=True)),
  mistral=("Mistral", dict(sliding_window=12)),
  mistral_full=("Mistral", dict(sliding_window=None)),
  qwen2=("Qwen2", dict(use_sliding_window=False, sliding_window=None)),
  qwen2_window=("Qwen2", dict(use_sliding_window=True, sliding_window=12, max_window_layers=0)),
  qwen3=("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
  qwen3_biased=("Qwen3", dict(head_dim=16, attention_bias=True)),
  phi3=("Phi3", dict(sliding_window=12, rope_parameters=LONGROPE)),
  phi3_partial=("Phi3", dict(rope_parameters=dict(PLAIN, partial_rotary_factor=0.5))),
)


def hf_model(name, **changes):
  import torch
  import transformers

  torch.manual_seed(0)
  kind, options = MODELS[name]
  sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5, pad_token_id=None,
               initializer_range=0.3, max_position_embeddings=64,
               rope_parameters=PLAIN)  # fmt: skip
  options = sizes | options | changes
  if kind == "Phi3":
    options |= dict(original_max_position_embeddings=16, eos_token_id=2)
  hf = getattr(transformers, f"{kind}Config")(**options)
  model = getattr(transformers, f"{kind}ForCausalLM")(hf).eval().float()
  with torch.no_grad():  # biases start at zero and norms at one, which would hide them
    for _, p in model.named_parameters():
      if p.ndim == 1:
        p.add_(0.3 * torch.randn_like(p))
  return model


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param)
  model = hf_model(request.param)
  model.save_pretrained(path)
  return request.param, str(path), model


def variables_of(c, **mesh):
  mesh = tiny.mesh(**mesh)
  with jax.set_mesh(mesh):
    return state.initial_variables(c, mesh, "")


def our_logits(c, variables, tokens, length):
  model = Llama(from_config(c))
  hidden = jax.jit(model.apply)(variables, tokens, resolve.rope(c, length))
  return hidden @ unembedding(variables["params"])


def blocks(c):
  c.model.update(block_q=8, block_k=8)
  return c


@pytest.mark.parametrize("length", [14, 40])
def test_logits_equal_those_of_transformers(checkpoint, length):
  """On both sides of LongRoPE's switch, at 16 tokens, and of the windows, of 12."""
  _, path, model = checkpoint
  c = blocks(presets.pretrained(path))
  tokens = tiny.tokens(2, length)
  theirs = hf_logits(model, tokens)
  np.testing.assert_allclose(our_logits(c, variables_of(c), tokens, length), theirs, atol=1e-4)


def test_exports_give_the_same_logits_in_transformers(checkpoint, tmp_path):
  from transformers import AutoModelForCausalLM

  name, path, model = checkpoint
  c = presets.pretrained(path)
  export.export(c, "", str(tmp_path / "out"), with_tokenizer=False, shard_bytes=20_000)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(report.values()), report
  for length in (14, 40):
    tokens = tiny.tokens(2, length)
    np.testing.assert_allclose(hf_logits(loaded, tokens), hf_logits(model, tokens), atol=1e-4)


def test_what_is_exported_is_imported_bit_for_bit(checkpoint, tmp_path):
  _, path, _ = checkpoint
  c = presets.pretrained(path)
  before = variables_of(c)
  export.export(c, "", str(tmp_path / "out"), with_tokenizer=False)
  again = presets.pretrained(str(tmp_path / "out"))
  assert again.model.to_dict() == c.model.to_dict()
  assert again.rope.to_dict() == c.rope.to_dict()
  jax.tree.map(np.testing.assert_array_equal, variables_of(again), before)
  ours, theirs = resolve.rope(again), resolve.rope(c)
  np.testing.assert_array_equal(ours.inv_freq, theirs.inv_freq)


def test_bfloat16_exports_are_imported_bit_for_bit(checkpoint, tmp_path):
  _, path, _ = checkpoint
  c = presets.pretrained(path)
  c.model.param_dtype = "bfloat16"
  export.export(c, "", str(tmp_path / "out"), with_tokenizer=False)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
  again = presets.pretrained(str(tmp_path / "out"))
  again.model.param_dtype = "bfloat16"
  jax.tree.map(np.testing.assert_array_equal, variables_of(again), variables_of(c))


def test_parts_that_a_mesh_wants_are_read(checkpoint):
  """Split over devices as it loads, a checkpoint is the same as whole."""
  _, path, _ = checkpoint
  c = presets.pretrained(path)
  mesh = tiny.mesh(fsdp=2, tensor=1, context=2)
  c.mesh.update(fsdp=2, context=2)
  with jax.set_mesh(mesh):
    split = state.initial_variables(c, mesh, "")
  jax.tree.map(np.testing.assert_array_equal, split, variables_of(c))
  sharded = [x for x in jax.tree.leaves(split) if not x.sharding.is_fully_replicated]
  assert len(sharded) >= 7


@pytest.mark.parametrize("name", ["llama_31", "qwen3", "phi3"])
def test_every_rope_of_a_checkpoint_is_extended_further(name, tmp_path):
  hf_model(name).save_pretrained(tmp_path)
  c = presets.pretrained(str(tmp_path), extend=True)
  own = open_source(str(tmp_path)).rope
  c.rope.context, c.rope.scaling = 4 * c.rope.context, "pi"
  at_its_context = hf_inv_freq(name, own.context)
  np.testing.assert_allclose(resolve.rope(c).inv_freq, at_its_context / 4, rtol=1e-6)
  assert (c.rope.base == "checkpoint") == bool(own.history)


def hf_inv_freq(name, length):
  """Of transformers, for a sequence of so many tokens."""
  import torch

  rotary = hf_model(name).model.rotary_emb
  rotary(torch.zeros(1), torch.arange(length)[None])
  return rotary.inv_freq.numpy()


@pytest.mark.parametrize(
  "parameters, maximum, context",
  [
    # Llama 3.2: the factor is of frequencies, not of the length.
    (LLAMA3 | dict(factor=32.0), 256, 256),
    (dict(PLAIN, rope_type="linear", factor=4.0), 64, 256),
    (dict(PLAIN, rope_type="yarn", factor=4.0, original_max_position_embeddings=16), 64, 64),
    (dict(PLAIN, rope_type="dynamic", factor=4.0), 64, 256),
  ],
)
def test_the_context_of_a_checkpoint_is_what_it_reaches(tmp_path, parameters, maximum, context):
  options = dict(rope_parameters=parameters, max_position_embeddings=maximum)
  hf_model("llama", **options).save_pretrained(tmp_path / "base")
  c = presets.pretrained(str(tmp_path / "base"))
  assert c.rope.context == context
  export.export(c, "", str(tmp_path / "out"), with_tokenizer=False)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["max_position_embeddings"] == maximum
  again = presets.pretrained(str(tmp_path / "out"))
  assert again.rope.to_dict() == c.rope.to_dict()


def test_the_maximum_of_a_linear_rope_may_be_before_or_after_it(tmp_path):
  linear = dict(PLAIN, rope_type="linear", factor=4.0)
  hf_model("llama", rope_parameters=linear).save_pretrained(tmp_path)
  c = presets.pretrained(str(tmp_path), extend=True)
  for original in (256, 64):
    c.rope.update(original_context=original, context=2 * original, scaling="pi")
    expected = hf_model("llama").model.rotary_emb.inv_freq.numpy() / 8
    np.testing.assert_allclose(resolve.rope(c).inv_freq, expected, rtol=1e-6)
  c.rope.update(original_context=128, context=256)
  with pytest.raises(ValueError, match="config.rope.original_context=128"):
    resolve.rope(c)


def test_a_box_is_a_part_or_none():
  """Only the first of several axes that are one there may be cut."""
  whole, half = slice(0, 4), slice(0, 2)
  assert names.box("layers/attention/q", (half, half, whole), (4, 4, 4)) == (
    slice(0, 8), slice(0, 2))  # fmt: skip
  assert names.box("layers/attention/q", (whole, whole, half), (4, 4, 4)) is None


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(bias=("q",)), "no architecture"),
    (dict(qk_norm=True, bias=("up",)), "no architecture"),
    (dict(window=8, bias=("q", "k", "v", "o")), "no architecture"),
  ],
)
def test_models_that_no_architecture_has_are_refused(change, message):
  c = config.base()
  c.model.update(change)
  with pytest.raises(ValueError, match=f"config.model.*{message}"):
    families.write(c.model, c.model.head_dim)


def test_a_window_in_some_layers_only_is_refused(tmp_path):
  hf_model("qwen2").save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  hf = json.loads(file.read_text()) | dict(use_sliding_window=True, sliding_window=8)
  hf["layer_types"] = ["full_attention", "sliding_attention"]
  file.write_text(json.dumps(hf))
  with pytest.raises(ValueError, match="some layers only"):
    open_source(str(tmp_path))


def test_a_window_that_is_not_used_is_none(tmp_path):
  hf_model("qwen2").save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  hf = json.loads(file.read_text()) | dict(use_sliding_window=False, sliding_window=8)
  file.write_text(json.dumps(hf | dict(layer_types=None, max_window_layers=0)))
  assert open_source(str(tmp_path)).hyperparameters["window"] == 0
  hf_model("mistral").save_pretrained(tmp_path / "m")
  file = tmp_path / "m" / "config.json"
  mixed = dict(layer_types=["full_attention", "sliding_attention"])
  file.write_text(json.dumps(json.loads(file.read_text()) | mixed))
  with pytest.raises(ValueError, match="some layers only"):
    open_source(str(tmp_path / "m"))


def test_phi3_has_4096_tokens_where_its_config_does_not_say(tmp_path):
  hf_model("phi3").save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  hf = json.loads(file.read_text()) | dict(max_position_embeddings=16384)
  del (
    hf["original_max_position_embeddings"],
    hf["rope_parameters"]["original_max_position_embeddings"],
  )
  file.write_text(json.dumps(hf))
  assert open_source(str(tmp_path)).rope.original_context == 4096


def test_phi3_is_given_only_ropes_that_it_has(tmp_path):
  hf_model("phi3_partial").save_pretrained(tmp_path / "base")
  c = presets.pretrained(str(tmp_path / "base"))
  c.rope.update(context=256, scaling="yarn")
  export.export(c, "", str(tmp_path / "out"), with_tokenizer=False)
  hf = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (hf["model_type"], hf["rope_parameters"]["rope_type"]) == ("phi3", "longrope")
  assert hf["partial_rotary_factor"] == 0.5


def test_heads_that_are_null_are_as_many_as_queries(tmp_path):
  hf_model("mistral", num_key_value_heads=4).save_pretrained(tmp_path)
  file = tmp_path / "config.json"
  hf = json.loads(file.read_text()) | dict(num_key_value_heads=None)
  file.write_text(json.dumps(hf))
  assert open_source(str(tmp_path)).hyperparameters["num_kv_heads"] == 4


def test_a_window_may_be_widened_but_not_lost(tmp_path):
  hf_model("mistral").save_pretrained(tmp_path)
  c = presets.pretrained(str(tmp_path))
  assert c.model.window == 12
  c.model.window = 48
  variables_of(c)
  for window in (0, 8):
    c.model.window = window
    with pytest.raises(ValueError, match=f"config.model.window={window}.*12"):
      variables_of(c)
