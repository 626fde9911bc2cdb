"""Hugging Face's config, both ways; transformers 5.23 is the judge."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import tiny
from goldens import make_hf_rope

from rope_jax import rope

D, THETA, L = 64, 1e4, 4096
BASE = rope.base(head_dim=D, theta=THETA, original_context=L)
SHORT = [1 + i / 100 for i in range(D // 2)]
LONG = [1.5 + i / 2 for i in range(D // 2)]


def config(parameters, maximum=4 * L, **more):
  return dict(head_dim=D, max_position_embeddings=maximum, rope_parameters=parameters, **more)


def parameters(kind, **more):
  return dict(rope_type=kind, rope_theta=THETA, **more)


def test_every_golden_case_is_read_from_its_config():
  read = 0
  for shape, method, ours, theirs, n in make_hf_rope.cases():
    length, s = shape["original_context"], theirs.get("factor", 1.0)
    fixed = theirs["rope_type"] in ("default", "dynamic", "linear", "proportional")
    c = config(
      dict(theirs, rope_theta=shape["theta"]), length if fixed else max(round(length * s), length)
    )
    c["head_dim"] = shape["head_dim"]
    if theirs["rope_type"] == "longrope" and s == 1.0:
      c["max_position_embeddings"] = length
    r = rope.from_hf(c, seq_len=n)
    expected = CASES[json.dumps([shape, method, ours], sort_keys=True)]
    np.testing.assert_allclose(r.inv_freq, expected["inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(r.attention_scale, expected["attention_factor"], rtol=1e-6)
    # And back: the same config, but for defaults written out.
    back = rope.to_hf(r)
    assert with_defaults(back) == with_defaults(c), theirs
    read += 1
  assert read > 300


CASES = {
  json.dumps([c["shape"], c["method"], c["options"]], sort_keys=True): c
  for c in json.loads(make_hf_rope.PATH.read_text())["cases"]
}  # fmt: skip

DEFAULTS = dict(
  yarn=dict(beta_fast=32.0, beta_slow=1.0, truncate=True),
  proportional=dict(factor=1.0),
)


def with_defaults(c):
  p = dict(c["rope_parameters"])
  return dict(c, rope_parameters=dict(DEFAULTS.get(p["rope_type"], {}), **p))


YARN = parameters("yarn", factor=4.0, original_max_position_embeddings=L)

ROUND_TRIPS = [
  (parameters("default"), L),
  (parameters("linear", factor=4.0), L),
  (parameters("dynamic", factor=2.0), L),
  (parameters("yarn", factor=4.0, original_max_position_embeddings=L), 4 * L),
  (parameters("yarn", factor=4.0, original_max_position_embeddings=L, beta_fast=16.0,
              truncate=False, mscale=0.7, mscale_all_dim=1.0), 4 * L),
  (parameters("yarn", factor=4.0, original_max_position_embeddings=L, attention_factor=1.5), 4 * L),
  (parameters("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=L), 16 * L),
  (parameters("longrope", factor=4.0, original_max_position_embeddings=L, short_factor=SHORT,
              long_factor=LONG), 4 * L),
  (parameters("longrope", factor=4.0, original_max_position_embeddings=L, short_factor=SHORT,
              long_factor=LONG, attention_factor=1.2), 4 * L),
  (parameters("proportional", partial_rotary_factor=0.25), L),
  (parameters("proportional", partial_rotary_factor=0.5, factor=8.0), L),
  (parameters("linear", factor=4.0, partial_rotary_factor=0.5), L),
]  # fmt: skip


@pytest.mark.parametrize("p, maximum", ROUND_TRIPS)
def test_a_config_survives_the_round_trip(p, maximum):
  c = config(p, maximum)
  for n in (None, 100, L, L + 1, 3 * L):
    assert rope.to_hf(rope.from_hf(c, seq_len=n)) == c


@functools.cache
def transformers_rope(text):
  """(inv_freq, attention factor) at four lengths, by LlamaRotaryEmbedding itself."""
  import torch
  from transformers import LlamaConfig
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  c = LlamaConfig(hidden_size=4 * D, num_attention_heads=4, **json.loads(text))
  embedding = LlamaRotaryEmbedding(c)
  found = []
  for n in (100, L, L + 1, 3 * L):
    embedding(torch.zeros(1), torch.arange(n)[None])
    found.append((embedding.inv_freq.double().numpy().copy(), float(embedding.attention_scaling)))
  return found


EXPORTS = dict(
  resonance_over_yarn=lambda n: rope.resonance(rope.yarn(BASE, 4.0)),
  dprope=lambda n: rope.dprope(BASE, 4.0, bins=90),
  longrope2=lambda n: rope.longrope2(BASE, 4.0, seq_len=n),
  power=lambda n: rope.power(BASE),
  hope=lambda n: rope.hope(BASE),
  drope=lambda n: rope.drope(BASE),
  cope_over_abf=lambda n: rope.cope(rope.abf(BASE, theta=5e5), pairs=8),
  abf=lambda n: rope.abf(BASE, theta=5e5),
  ntk=lambda n: rope.ntk(BASE, 4.0),
  ntk_critical=lambda n: rope.ntk_critical(BASE, 4.0),
  yarn_by_rotations=lambda n: rope.yarn(BASE, 4.0, ramp="rotation"),
  dynamic_ntk=lambda n: rope.dynamic_ntk(BASE, 2.0, seq_len=n),
  longrope_yarn_scale=lambda n: rope.longrope(
    BASE, 4.0, seq_len=n, long_factor=LONG, short_factor=SHORT, attention="yarn"
  ),
  yarn_over_llama3=lambda n: rope.yarn(rope.rebase(rope.llama3(BASE, 2.0)), 2.0),
)


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_run_in_unmodified_transformers_on_both_sides_of_the_original_length(name):
  make = EXPORTS[name]
  exported = json.dumps(rope.to_hf(make(4 * L)), allow_nan=False)
  theirs = transformers_rope(exported)
  for (inv_freq, scale), n in zip(theirs, (100, L, L + 1, 3 * L)):
    ours = make(n)
    np.testing.assert_allclose(inv_freq, ours.inv_freq, rtol=2e-6, atol=1e-29)
    np.testing.assert_allclose(scale, ours.attention_scale, rtol=1e-6)
  # And we read our own exports.
  again = rope.from_hf(json.loads(exported), seq_len=3 * L)
  np.testing.assert_allclose(again.inv_freq, make(3 * L).inv_freq, rtol=1e-12, atol=1e-29)


@pytest.mark.parametrize("method", [n for n in rope.SCALINGS if n not in ("none", "clex", "fope")])
def test_every_static_method_can_be_exported(method):
  r = tiny.scaled(method, BASE, 4.0)
  freeze = method.startswith("dynamic") and method != "dynamic_ntk"
  if freeze:
    with pytest.raises(ValueError, match=f"{method} depends on the length.*freeze"):
      rope.to_hf(r)
  back = rope.from_hf(rope.to_hf(r, freeze=freeze), seq_len=4 * L)
  np.testing.assert_allclose(back.inv_freq, r.inv_freq, rtol=1e-9, atol=1e-29)
  np.testing.assert_array_equal(back.inv_freq == 0, r.inv_freq == 0)
  np.testing.assert_allclose(back.attention_scale, r.attention_scale, rtol=1e-9)


@pytest.mark.parametrize(
  "r, message",
  [
    (rope.stack([BASE, BASE]), "layer or head"),
    (rope.longrope(BASE, 4.0, seq_len=9999, long_factor=LONG, start_tokens=4), "start_tokens"),
    (rope.fope(BASE), "fope"),
    (rope.clex(BASE, seq_len=9999), "clex"),
    (rope.resonance(rope.dynamic_ntk(BASE, 2.0, seq_len=9999)), "depends on the length"),
  ],
  ids=["layers", "start tokens", "fope", "clex", "resonance over dynamic"],
)
def test_what_hugging_face_cannot_say_is_refused(r, message):
  with pytest.raises(ValueError, match=message):
    rope.to_hf(r)


def test_older_configs_keep_their_base():
  """rope_scaling with `type`, and rope_theta beside it, as transformers 4 wrote them."""
  c = dict(
    hidden_size=4 * D,
    num_attention_heads=4,
    max_position_embeddings=4 * L,
    original_max_position_embeddings=L,
    rope_theta=5e5,
    rope_scaling=dict(type="su", short_factor=SHORT, long_factor=LONG),
  )
  r = rope.from_hf(c, seq_len=L + 1)
  assert (r.theta, r.original_context, r.context) == (5e5, L, 4 * L)
  np.testing.assert_allclose(r.inv_freq, 5e5 ** -(np.arange(0, D, 2) / D) / np.array(LONG))
  assert rope.from_hf(dict(c, rope_scaling=None)).theta == 5e5
  assert rope.from_hf(dict(max_position_embeddings=8, head_dim=4)).theta == 1e4


def test_configs_as_they_are_found_are_read():
  longer = dict(max_position_embeddings=10 * L)
  # The recipe of Qwen3: the maximum lies between the original and what the factor reaches.
  r = rope.from_hf(config(YARN, maximum=int(1.25 * L)))
  assert (r.original_context, r.context) == (L, 4 * L)
  np.testing.assert_allclose(r.inv_freq, rope.yarn(BASE, 4.0).inv_freq)
  # YaRN's own checkpoints; DeepSeek's scales of 0, which are none.
  extra = dict(YARN, finetuned=True, mscale=0, mscale_all_dim=0)
  np.testing.assert_array_equal(rope.from_hf(config(extra)).inv_freq, r.inv_freq)
  # Phi-3's first configs called theirs 'su' and 'yarn'.
  lists = dict(short_factor=SHORT, long_factor=LONG)
  old = [dict(rope_scaling=dict(type=t, **lists), original_max_position_embeddings=L, head_dim=D,
              **longer) for t in ("su", "yarn", "longrope")]  # fmt: skip
  assert len({rope.from_hf(c).history[0][0] for c in old}) == 1
  # A rope for each type of layer, of which one is asked for.
  nested = config(dict(full_attention=YARN, sliding_attention=parameters("default")))
  np.testing.assert_array_equal(
    rope.from_hf(nested, layer_type="full_attention").inv_freq, r.inv_freq
  )
  assert not rope.from_hf(nested, layer_type="sliding_attention").history


def test_a_base_changed_after_scaling_is_exported_as_it_is():
  for scaled in (rope.yarn(BASE, 4.0), rope.llama3(BASE, 4.0)):
    r = rope.abf(scaled, theta=5e5)
    (theirs, _), *_ = transformers_rope(json.dumps(rope.to_hf(r)))
    np.testing.assert_allclose(theirs, r.inv_freq, rtol=2e-6)


def test_an_export_for_a_longer_context_than_the_factor_reaches_can_be_read_again():
  r = dataclasses.replace(rope.yarn(BASE, 4.0), context=16 * L)
  assert rope.to_hf(r)["max_position_embeddings"] == 4 * L
  odd = rope.yarn(rope.base(head_dim=D, theta=THETA, original_context=10), np.float32(1.26))
  for x in (r, odd):
    np.testing.assert_allclose(
      rope.from_hf(json.loads(json.dumps(rope.to_hf(x)))).inv_freq, x.inv_freq
    )


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(rope_parameters=parameters("yorn")), "rope_type='yorn'"),
    (dict(rope_parameters=dict(YARN, beta_fst=3)), "beta_fst: unknown"),
    (dict(rope_parameters=dict(YARN, low_freq_factor=1.0)), "low_freq_factor: unknown"),
    (dict(rope_parameters=parameters("linear")), "factor: required"),
    (dict(rope_parameters=parameters("longrope", long_factor=LONG)), "short_factor: required"),
    (dict(rope_parameters=dict(YARN, factor=0.5)), "factor=0.5"),
    (dict(rope_parameters=dict(YARN, factor="4")), "factor='4'.*number"),
    (dict(rope_parameters=dict(YARN, factor=True)), "factor=True.*number"),
    (dict(rope_parameters=dict(YARN, factor=2.0)), "factor=2.0 and max_position_embeddings=16384"),
    (dict(max_position_embeddings=L // 2), "original_max.*4096 is above max.*2048"),
    (dict(original_max_position_embeddings=L // 2), "4096 and .*=2048 differ"),
    (dict(max_position_embeddings=None), "max_position_embeddings=None"),
    (dict(rope_theta=5e5), "rope_theta=10000.0 and rope_theta=500000.0 differ"),
    (dict(rope_scaling=parameters("linear", factor=2.0)), "rope_scaling are both given"),
    (dict(rope_parameters=dict(YARN, type="linear")), "rope_type='yarn' and type='linear'"),
    (dict(rope_parameters=dict(factor=4.0)), "no rope_type"),
    (dict(rope_parameters=dict(full=YARN, sliding=YARN)), "layer_type=None.*full, sliding"),
    (dict(rope_parameters="yarn"), "rope_parameters='yarn'"),
    (dict(rope_parameters=dict(YARN, rope_type=["yarn"])), "rope_type"),
    (dict(rope_parameters=dict(YARN, truncate="no")), "truncate='no'"),
    (dict(rope_parameters=dict(YARN, mscale=-1.0, mscale_all_dim=1.0)), "mscale"),
    (dict(rope_parameters=parameters("longrope", long_factor=2.0, short_factor=SHORT)),
     "long_factor=2.0.*list"),
    (dict(rope_parameters=parameters("longrope", long_factor=LONG, short_factor=[])),
     "short_factor=.*list"),
    (dict(rope_parameters=parameters("longrope", long_factor=["2"] * 32, short_factor=SHORT)),
     "long_factor.*number"),
    (dict(qk_rope_head_dim=64), "qk_rope_head_dim=64"),
    (dict(rope_parameters=dict(YARN, beta_fast=0.5)), "beta_slow"),
    (dict(rope_parameters=dict(YARN, mscale=1.0)), "mscale_all_dim"),
    (dict(head_dim=63), "head_dim"),
    (dict(head_dim=None), "hidden_size"),
    (dict(rope_parameters=dict(parameters("longrope", long_factor=LONG[1:], short_factor=SHORT),
                               original_max_position_embeddings=L)), "32 pairs.*31"),
    (dict(rope_parameters=parameters("dynamic", factor=2.0, original_max_position_embeddings=L)),
     "dynamic"),
    (dict(rope_parameters=parameters("proportional")), "partial_rotary_factor: required"),
  ],
)  # fmt: skip
def test_bad_configs_are_refused_by_key(change, message):
  rope.from_hf(config(YARN))
  with pytest.raises(ValueError, match=message):
    rope.from_hf(config(YARN) | change)
