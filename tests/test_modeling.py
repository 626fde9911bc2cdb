"""The modelling file of exports with a learned phase, loaded by transformers as users load it."""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import rope_jax
from rope_jax import rope
from rope_jax.export import modeling_rope_jax
from rope_jax.model.config import ModelConfig
from rope_jax.model.llama import Llama, unembedding
from rope_jax.weights import load
from rope_jax.weights.source import open_source

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


# --- the functions ---


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("bound", [None, 0, 2.5, "gate"])
@pytest.mark.parametrize("pairs", [4, 3])
def test_functions_are_those_of_rope_jax(heads, bound, pairs):
  rng = np.random.default_rng(0)
  x = 0.5 * rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
  outputs = 8 if bound == "gate" else pairs
  up, down = (0.5 * rng.normal(size=(heads, 8, n)).astype(np.float32) for n in (8, outputs))
  given = [torch.tensor(y) for y in (x, up, down)]
  if bound == "gate":
    ours, theirs = rope.psc_gate(x, up, down), modeling_rope_jax.psc_gate(*given)
  else:
    ours = rope.psc_rotation(jnp.asarray(x), up, down, bound=bound or None)
    theirs = modeling_rope_jax.psc_rotation(*given, bound)
  np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-6)


def test_the_gate_of_bfloat16_is_computed_in_float32():
  rng = np.random.default_rng(0)
  x, up, down = (rng.normal(size=s).astype(np.float32) for s in ((64, 2, 8), (2, 8, 8), (2, 8, 8)))
  given = [torch.tensor(y).bfloat16() for y in (x, up, down)]
  gate = modeling_rope_jax.psc_gate(*given)
  y = modeling_rope_jax._two_layers(*given)
  assert gate.dtype == y.dtype == torch.bfloat16
  assert torch.equal(gate, (1 + 0.5 * torch.tanh(y.double())).bfloat16())
  ours = rope.psc_gate(jnp.asarray(x, jnp.bfloat16), up, down)
  difference = np.abs(gate.float().numpy() - np.asarray(ours, np.float32))
  assert np.median(difference) == 0 and difference.max() < 0.02  # the products round differently


# --- the whole model ---


# Ropes and phases do not meet in the code: one phase is enough for the others.
@pytest.mark.parametrize(
  "phase, rope_type",
  [(phase, "default") for phase in PHASES] + [(PRE, "yarn"), (PRE, "longrope")],
  ids=name_of,
)
def test_logits_and_gradients_are_those_of_our_llama(tmp_path, phase, rope_type):
  _, tensors, _ = export(tmp_path, "llama", phase, rope_type)
  source = open_source(str(tmp_path / "base"))
  keys = dict(psc_share="heads" if phase.get("share_heads") else "none")
  keys |= {f"psc_{k}": v for k, v in phase.items() if k in ("calibration", "bound")}
  m = Llama(
    ModelConfig(**source.hyperparameters, block_q=8, block_k=8, phase=phase["kind"], **keys)
  )
  tokens = tiny.tokens(2, 24)
  abstract = jax.eval_shape(lambda: m.init(jax.random.key(0), tokens, source.rope))
  params = load.load_params(
    str(tmp_path / "base"), abstract["params"], lambda leaf, x: jnp.asarray(x)
  )

  def stacked(q_or_k, part):
    name = "model.layers.{}.self_attn.phase_{}.{}"
    return np.stack([tensors[name.format(i, q_or_k, part)].numpy() for i in range(LAYERS)])

  psc = {f"psc_{x}": {p: stacked(x, p) for p in ("up", "down")} for x in "qk"}
  variables = dict(params=params, phase=dict(layers=dict(attention=psc)))
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, dict(abstract))
  weight = np.random.default_rng(2).normal(size=(*tokens.shape, 61)).astype(np.float32)

  @jax.jit
  def loss(variables):
    out = m.apply(variables, tokens, source.rope) @ unembedding(variables["params"])
    return (out * weight).sum() / 100, out

  (_, ours), d_ours = jax.value_and_grad(loss, has_aux=True)(variables)
  model = loaded(tmp_path / "export")
  theirs = model(torch.tensor(tokens, dtype=torch.long)).logits
  ((theirs * torch.tensor(weight)).sum() / 100).backward()
  np.testing.assert_allclose(theirs.detach().numpy(), ours, atol=1e-4)
  d_psc = d_ours["phase"]["layers"]["attention"]
  for i, layer in enumerate(model.model.layers):
    for x in "qk":
      for part in ("up", "down"):
        d = getattr(getattr(layer.self_attn, f"phase_{x}"), part).grad
        assert d.abs().max() > 1e-2
        np.testing.assert_allclose(d.numpy(), d_psc[f"psc_{x}"][part][i], atol=1e-4)
      d = getattr(layer.self_attn, f"{x}_proj").weight.grad.numpy().T
      d_x = d_ours["params"]["layers"]["attention"][x][i]
      np.testing.assert_allclose(d, d_x.reshape(d.shape), atol=1e-4)


@families
@phases
def test_logits_are_those_of_the_oracle(tmp_path, kind, phase):
  _, tensors, config = export(tmp_path, kind, phase)
  tokens = tiny.tokens(2, 24)
  ours = oracle(tensors, config, tokens)
  theirs = logits(loaded(tmp_path / "export"), tokens)
  np.testing.assert_allclose(theirs, ours, atol=1e-4)


# Phi-3 in transformers has no yarn: it reads that word as longrope.
@pytest.mark.parametrize(
  "kind, rope_type", [(k, r) for k in FAMILIES for r in ("yarn", "longrope") if r + k != "yarnphi3"]
)
def test_logits_with_other_ropes_are_those_of_the_oracle(tmp_path, kind, rope_type):
  options = dict(original_max_position_embeddings=32) if kind == "phi3" else {}
  _, tensors, config = export(tmp_path, kind, PRE, rope_type, **options)
  tokens = tiny.tokens(2, 24)
  ours = oracle(tensors, config, tokens)
  np.testing.assert_allclose(logits(loaded(tmp_path / "export"), tokens), ours, atol=1e-4)
  plain = dict(config, rope_parameters=parameters("default"))
  assert np.abs(oracle(tensors, plain, tokens) - ours).max() > 1e-2


@phases
@pytest.mark.parametrize("rope_type", ["default", "longrope"])
def test_partial_rotary_turns_the_pairs_that_our_rotation_turns(tmp_path, phase, rope_type):
  options = dict(original_max_position_embeddings=32, partial=0.75)
  _, tensors, config = export(tmp_path, "phi3", phase, rope_type, **options)
  tokens = tiny.tokens(2, 24)
  ours = oracle(tensors, config, tokens)
  np.testing.assert_allclose(logits(loaded(tmp_path / "export"), tokens), ours, atol=1e-4)


@families
@phases
def test_a_zero_phase_is_the_base_model_bit_for_bit(tmp_path, kind, phase):
  base, _, _ = export(tmp_path, kind, phase, change=zero_up)
  tokens = tiny.tokens(2, 24)
  np.testing.assert_array_equal(logits(loaded(tmp_path / "export"), tokens), logits(base, tokens))


@families
def test_tied_embeddings_stay_tied(tmp_path, kind):
  _, tensors, config = export(tmp_path, kind, PRE, tie_word_embeddings=True)
  assert "lm_head.weight" not in tensors
  model = loaded(tmp_path / "export")
  assert model.lm_head.weight is model.model.embed_tokens.weight
  tokens = tiny.tokens(2, 24)
  np.testing.assert_allclose(logits(model, tokens), oracle(tensors, config, tokens), atol=1e-4)


@families
@pytest.mark.parametrize("phase", [PRE, POST, ROTATION], ids=name_of)
def test_cached_generation_of_a_padded_batch_is_greedy_without_a_cache(tmp_path, kind, phase):
  export(tmp_path, kind, phase)
  model, new = loaded(tmp_path / "export"), 8
  rows = [torch.tensor(tiny.tokens(1, n, seed=n)[0], dtype=torch.long) for n in (5, 11)]
  tokens, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
  for i, row in enumerate(rows):
    tokens[i, -len(row) :], mask[i, -len(row) :] = row, 1
  options = dict(max_new_tokens=new, do_sample=False, pad_token_id=0)
  options |= dict(return_dict_in_generate=True, output_logits=True)
  out = model.generate(tokens, attention_mask=mask, **options)
  assert out.past_key_values.get_seq_length() == 11 + new - 1
  for i, row in enumerate(rows):
    for step in range(new):
      expected = logits(model, row[None])[0, -1]
      np.testing.assert_allclose(out.logits[step][i].numpy(), expected, atol=1e-4)
      row = torch.cat((row, torch.tensor([expected.argmax()])))
    np.testing.assert_array_equal(out.sequences[i, 11:], row[-new:])


@families
def test_attention_implementations_agree_and_attentions_are_returned(tmp_path, kind):
  export(tmp_path, kind, POST)
  tokens = tiny.tokens(2, 24)
  sdpa, eager = (loaded(tmp_path / "export", attn_implementation=x) for x in ("sdpa", "eager"))
  np.testing.assert_allclose(logits(sdpa, tokens), logits(eager, tokens), atol=1e-5)
  out = eager(torch.tensor(tokens, dtype=torch.long), output_attentions=True)
  assert [x.shape for x in out.attentions] == LAYERS * [(2, HEADS, 24, 24)]


@families
def test_attention_functions_are_given_what_the_base_model_gives(tmp_path, kind):
  """What only FlashAttention reads, too: it has no mask and slides by `sliding_window`."""
  base, _, _ = export(tmp_path, kind, PRE, change=zero_up)
  calls = []

  def spy(module, q, k, v, mask, **options):
    calls.append(((q.shape, k.shape, v.shape), {"sliding_window": None} | options))
    return transformers.AttentionInterface()["sdpa"](module, q, k, v, mask, **options)

  transformers.AttentionInterface.register("spy", spy)
  transformers.AttentionMaskInterface.register("spy", transformers.masking_utils.sdpa_mask)
  for model in (base, loaded(tmp_path / "export")):
    model.set_attn_implementation("spy")
    logits(model, tiny.tokens(2, 24))
  for (shapes, options), (our_shapes, ours) in zip(calls[:LAYERS], calls[LAYERS:], strict=True):
    assert shapes == our_shapes
    assert options.keys() == ours.keys()
    for key in set(options) - {"position_ids"}:
      assert options[key] is ours[key] or options[key] == ours[key], key


def test_a_post_calibration_is_not_a_pre_calibration(tmp_path):
  _, tensors, config = export(tmp_path, "llama", PRE)
  tokens = tiny.tokens(2, 24)
  difference = oracle(tensors, config, tokens) - oracle(tensors, dict(config, phase=POST), tokens)
  assert np.abs(difference).max() > 1e-2


# --- training ---


@families
@phases
def test_training_starts_from_the_identity_and_checkpoints_layers(tmp_path, kind, phase):
  export(tmp_path, kind, phase)
  config = transformers.AutoConfig.from_pretrained(tmp_path / "export", trust_remote_code=True)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
  model.activation_checkpointing_enable()
  tokens = torch.tensor(tiny.tokens(2, 24), dtype=torch.long)
  model(tokens, labels=tokens).loss.backward()
  found = {n: p for n, p in model.named_parameters() if ".phase_" in n}
  assert len(found) == 4 * LAYERS
  for name, p in found.items():
    if name.endswith(".up"):
      assert not p.any() and p.grad.any()
    else:
      assert 0.7 / HEAD_DIM < p.abs().max() <= 1 / HEAD_DIM and not p.grad.any()


def test_adapters_on_the_projections_come_before_the_phase(tmp_path):
  """As in our model; PEFT replaces the modules, so a hook on them would not see the sum."""
  import peft

  export(tmp_path, "llama", PRE)
  lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
  torch.manual_seed(0)
  model = peft.get_peft_model(loaded(tmp_path / "export"), lora).eval()
  tokens = tiny.tokens(2, 24)
  adapted = logits(model, tokens)
  assert np.abs(adapted - logits(loaded(tmp_path / "export"), tokens)).max() > 1e-2
  merged = logits(copy.deepcopy(model).merge_and_unload(), tokens)
  np.testing.assert_allclose(merged, adapted, atol=1e-4)


# --- files ---


@families
@phases
def test_saving_and_loading_gives_the_same_model(tmp_path, kind, phase):
  _, tensors, config = export(tmp_path, kind, phase)
  model = loaded(tmp_path / "export")
  model.save_pretrained(tmp_path / "again")
  assert (tmp_path / "again" / FILE.name).read_bytes() == FILE.read_bytes()
  saved = json.loads((tmp_path / "again" / "config.json").read_text())
  changed = {k for k in config | saved if config.get(k) != saved.get(k)}
  assert changed <= {"transformers_version"}
  written = load_file(tmp_path / "again" / "model.safetensors")
  assert written.keys() == tensors.keys()
  assert all(torch.equal(written[k], x) for k, x in tensors.items())
  tokens = tiny.tokens(2, 24)
  again = loaded(tmp_path / "again")
  np.testing.assert_array_equal(logits(again, tokens), logits(model, tokens))


def test_models_made_in_memory_can_be_saved_and_loaded(tmp_path):
  config = modeling_rope_jax.RopeJaxQwen3Config(**SIZES, head_dim=HEAD_DIM, phase=POST)
  model = modeling_rope_jax.RopeJaxQwen3ForCausalLM(config).eval()
  model.save_pretrained(tmp_path / "model")
  tokens = tiny.tokens(1, 9)
  np.testing.assert_array_equal(logits(loaded(tmp_path / "model"), tokens), logits(model, tokens))
  decoder = modeling_rope_jax.RopeJaxQwen3Model(copy.deepcopy(config))
  decoder.save_pretrained(tmp_path / "decoder")
  again = loaded(tmp_path / "decoder", transformers.AutoModel)
  assert all(torch.equal(again.state_dict()[k], x) for k, x in decoder.state_dict().items())


@families
def test_the_decoder_loads_on_its_own(tmp_path, kind):
  export(tmp_path, kind, PRE)
  tokens = torch.tensor(tiny.tokens(2, 24), dtype=torch.long)
  decoder = loaded(tmp_path / "export", transformers.AutoModel)
  with torch.no_grad():
    hidden = decoder(tokens).last_hidden_state
    expected = loaded(tmp_path / "export").model(tokens).last_hidden_state
  np.testing.assert_array_equal(hidden, expected)


def test_bfloat16_tensors_are_read_and_kept(tmp_path):
  _, tensors, config = export(tmp_path, "llama", PRE, dtype=torch.bfloat16)
  tokens = tiny.tokens(2, 24)
  ours = oracle(tensors, config, tokens)
  model = loaded(tmp_path / "export", dtype=torch.float32)
  np.testing.assert_allclose(logits(model, tokens), ours, atol=1e-4)
  half = loaded(tmp_path / "export", dtype=torch.bfloat16)
  assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
  assert np.isfinite(logits(half.float(), tokens)).all()


def test_missing_and_unexpected_tensors_are_reported(tmp_path):
  gone = "model.layers.1.self_attn.phase_k.up"

  def change(tensors):
    tensors["model.layers.0.self_attn.phase_v.up"] = tensors.pop(gone)

  export(tmp_path, "llama", PRE, change=change)
  model, info = loaded(tmp_path / "export", output_loading_info=True)
  assert set(info["missing_keys"]) == {gone}
  assert set(info["unexpected_keys"]) == {"model.layers.0.self_attn.phase_v.up"}
  attention = model.model.layers[1].self_attn
  assert not attention.phase_k.up.any()  # the identity, and what was there is kept
  assert attention.phase_k.down.abs().max() > 0.5


@pytest.mark.parametrize("share", [True, False])
def test_tensors_that_do_not_fit_share_heads_are_refused(tmp_path, share):
  export(tmp_path, "llama", dict(PRE, share_heads=share))
  file = tmp_path / "export" / "config.json"
  config = json.loads(file.read_text())
  config["phase"]["share_heads"] = not share
  file.write_text(json.dumps(config))
  with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
    loaded(tmp_path / "export")


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(phase=None), "no 'phase'"),
    (dict(phase=dict(kind="psc")), "must have exactly the keys"),
    (dict(phase=dict(kind="clex")), "must have exactly the keys"),
    (dict(phase=dict(PRE, bound=1.0)), "must have exactly the keys"),
    (dict(phase=dict(PRE, calibration="both")), "calibration is 'pre' or 'post'"),
    (dict(phase=dict(ROTATION, bound=-1)), "bound is not negative"),
    (dict(base_model_type="qwen2"), "base_model_type='qwen2' is not for RopeJaxLlamaConfig"),
  ],
)
def test_a_phase_that_is_not_understood_is_refused(tmp_path, change, message):
  export(tmp_path, "llama", PRE)
  file = tmp_path / "export" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(ValueError, match=message):
    loaded(tmp_path / "export")


def test_without_trust_nothing_is_loaded(tmp_path):
  export(tmp_path, "llama", PRE)
  for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.AutoConfig):
    with pytest.raises(ValueError, match="trust_remote_code"):
      auto.from_pretrained(tmp_path / "export", trust_remote_code=False)
  shutil.rmtree(tmp_path / "base")
  config = json.loads((tmp_path / "export" / "config.json").read_text())
  del config["auto_map"]  # not even then as a Llama
  (tmp_path / "export" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="rope_jax"):
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=False)


SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
try:
  AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as e:
  assert "trust_remote_code" in str(e)
else:
  raise SystemExit("loaded without trust")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "RopeJaxPhi3ForCausalLM"
assert not any(name.split(".")[0] in ("rope_jax", "jax") for name in sys.modules)
"""


def test_a_process_without_rope_jax_loads_the_export_offline(tmp_path):
  export(tmp_path, "phi3", ROTATION)
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  env |= dict(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
  command = [sys.executable, "-c", SCRIPT, str(tmp_path / "export")]
  done = subprocess.run(
    command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def imports(file):
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_file_stands_alone_and_the_package_does_not_import_it():
  assert {x.split(".")[0] for x in imports(FILE)} == {"importlib", "torch", "transformers"}
  for file in Path(rope_jax.__file__).parent.rglob("*.py"):
    if file != FILE:
      assert not any(FILE.stem in x or x.split(".")[0] == "torch" for x in imports(file)), file
