"""The modelling file of exports with a learned phase, loaded by transformers as users load it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from psc_exports import (
  FAMILIES,
  HEADS,
  LAYERS,
  PHASES,
  POST,
  PRE,
  ROTATION,
  _modules_cache,  # noqa: F401
  export,
  families,
  loaded,
  logits,
  name_of,
  oracle,
  parameters,
  phases,
  zero_up,
)

from rope_jax import rope
from rope_jax.export import modeling_rope_jax
from rope_jax.model.config import ModelConfig
from rope_jax.model.llama import Llama, unembedding
from rope_jax.weights import load
from rope_jax.weights.source import open_source

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
  params = load.load_params(str(tmp_path / "base"), abstract["params"])

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
