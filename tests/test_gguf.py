"""GGUF sources: tensors, hyperparameters and ropes against what was written into the files."""

import math

import gguf
import gguf_files
import ml_dtypes
import numpy as np
import pytest

from rope_jax import rope, weights
from rope_jax.weights import gguf_check
from rope_jax.weights.gguf_file import GGUFSource

BIAS = dict(llama=("q", "k", "v", "o"), qwen2=("q", "k", "v"), qwen3=(), phi3=())
ARCHS = tuple(BIAS)


def model(path, arch, fields=(), extra=(), tie=False, **sizes):
  state = gguf_files.state(BIAS[arch], qk_norm=arch == "qwen3", tie=tie, **sizes)
  tensors = gguf_files.stored(arch, state, **sizes) | dict(extra)
  fields = gguf_files.metadata(arch, **sizes, **dict(fields))
  return state, gguf_files.write(path / "m.gguf", arch, tensors, fields)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_every_tensor_comes_back_under_its_name_in_half_split_order(tmp_path, arch, tie, head_dim):
  state, path = model(tmp_path, arch, tie=tie, head_dim=head_dim)
  source = GGUFSource(path)
  assert source.names() == set(state) and source.unread == []
  for name, x in state.items():
    assert source.shape(name) == x.shape
    np.testing.assert_array_equal(source.read(name), x, err_msg=name)
  assert source.family == arch and source.path == path
  assert source.hyperparameters == dict(
    gguf_files.SIZES, head_dim=head_dim, norm_eps=np.float32(1e-5), tie_embeddings=tie,
    bias=BIAS[arch], qk_norm=arch == "qwen3", window=0,
  )  # fmt: skip
  assert source.field("general.architecture") == arch
  assert source.field("nothing") is None and source.field("nothing", 3) == 3


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_a_box_reads_the_same_numbers(tmp_path, arch):
  state, path = model(tmp_path, arch)
  source = GGUFSource(path)
  cuts = (slice(None), slice(3, 11), slice(2, None, 3), slice(5, 5), slice(None, None, -1))
  for name, x in state.items():
    for rows in cuts:
      for columns in cuts if x.ndim == 2 else [None]:
        box = (rows,) if columns is None else (rows, columns)
        np.testing.assert_array_equal(source.read(name, box), x[box], err_msg=f"{name} {box}")
  for box in (0, slice(2)), (slice(2),), (slice(2),) * 3:
    with pytest.raises(ValueError, match="must be a slice for each dimension"):
      source.read("model.layers.0.mlp.down_proj.weight", box)


def five_bits(raw, kind):
  """Q5_0 and Q5_1 by ggml-quants.c, one block at a time."""
  out = []
  for block in raw.reshape(-1, 22 if kind == "Q5_0" else 24):
    d = float(block[:2].view(np.float16)[0])
    m = -16 * d if kind == "Q5_0" else float(block[2:4].view(np.float16)[0])
    at = 2 if kind == "Q5_0" else 4
    high, low = int(block[at : at + 4].view(np.uint32)[0]), block[at + 4 :].astype(int)
    bits = [(low[j] & 15 if j < 16 else low[j - 16] >> 4) | (high >> j & 1) << 4 for j in range(32)]
    out.append([q * d + m for q in bits])
  return np.array(out, np.float32).reshape(raw.shape[0], -1)


def expected(raw, kind):
  """Transformers' own dequantisation, or numpy's reading of the plain types."""
  plain = dict(F32=np.float32, F16=np.float16, BF16=ml_dtypes.bfloat16)
  if kind in plain:
    return raw.view(plain[kind])
  if kind.startswith("Q5_") and kind != "Q5_K":
    return five_bits(raw, kind)
  import torch
  from transformers.integrations.gguf.dequant import dequantize

  out = dequantize(torch.from_numpy(raw.copy()), int(gguf.GGMLQuantizationType[kind]))
  return out.numpy().reshape(raw.shape[0], -1)


def random_blocks(rng, kind, rows, columns):
  """Valid blocks: random bits, with every half-precision scale finite."""
  elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
  if elements == 1:
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    return x.astype(dict(F16=np.float16, BF16=ml_dtypes.bfloat16).get(kind, np.float32)).view("u1")
  raw = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
  # Where ggml-common.h puts d, and dmin or m where there is one.
  halves = dict(Q4_1=(0, 2), Q5_1=(0, 2), Q2_K=(80, 82), Q3_K=(108,), Q4_K=(0, 2), Q5_K=(0, 2))
  for at in halves.get(kind, (208,) if kind == "Q6_K" else (0,)):
    scales = rng.normal(size=raw.shape[:2]).astype(np.float16)
    raw[:, :, at : at + 2] = scales[..., None].view(np.uint8)
  return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", gguf_check.SUPPORTED)
def test_every_quantisation_is_read(tmp_path, kind):
  """With boxes that begin and end within a block, and rows of q in their other order."""
  sizes = dict(d_model=512, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=1)
  tensors = gguf_files.stored("llama", gguf_files.state(tie=True, **sizes), **sizes)
  rng, raw = np.random.default_rng(0), {}
  for name, rows in (("attn_q", 32), ("ffn_up", 48)):
    del tensors[f"blk.0.{name}.weight"]
    blocks = random_blocks(rng, kind, rows, 512)
    raw[f"blk.0.{name}.weight"] = (blocks, gguf.GGMLQuantizationType[kind])
  fields = gguf_files.metadata("llama", **sizes)
  source = GGUFSource(gguf_files.write(tmp_path / "m.gguf", "llama", tensors, fields, raw))
  up, q = (expected(raw[f"blk.0.{name}.weight"][0], kind) for name in ("ffn_up", "attn_q"))
  q = q.reshape(4, 4, 2, 512).swapaxes(1, 2).reshape(32, 512)
  for name, x in (("mlp.up_proj", up), ("self_attn.q_proj", q)):
    name = f"model.layers.0.{name}.weight"
    got = source.read(name)
    assert got.shape == x.shape and got.dtype == x.dtype and x.astype(np.float32).std() > 0
    # Six bits times a scale: the order of two roundings is all that may differ.
    atol = 0 if kind in ("F32", "F16", "BF16") else 1e-6 * np.abs(x).max()
    np.testing.assert_allclose(got.astype(np.float32), x.astype(np.float32), rtol=1e-6, atol=atol)
    for box in (slice(5, 20), slice(30, 300)), (slice(1, None, 7), slice(511, 100, -3)):
      np.testing.assert_array_equal(source.read(name, box), got[box])
      assert source.read(name, (slice(4, 4), box[1])).shape == got[4:4, box[1]].shape


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_near_what_was_quantised(tmp_path, kind):
  """From the other end: `gguf.quantize` of known weights, which are right up to their rounding."""
  state = gguf_files.state(num_layers=1)
  tensors = gguf_files.stored("qwen2", state, num_layers=1)
  x = tensors.pop("output.weight")
  number = gguf.GGMLQuantizationType[kind]
  raw = {"output.weight": (gguf.quantize(x, number), number)}
  fields = gguf_files.metadata("qwen2", num_layers=1)
  source = GGUFSource(gguf_files.write(tmp_path / "m.gguf", "qwen2", tensors, fields, raw))
  steps = dict(Q8_0=127, Q4_0=8, Q4_1=8, Q5_0=16, Q5_1=16)[kind]
  assert np.abs(source.read("lm_head.weight") - x).max() < 1.1 * np.abs(x).max() / steps


def test_the_packaged_model_is_read_as_the_gguf_package_reads_it():
  path = weights.locate("smollm2-135m")[1]
  reader, source = gguf.GGUFReader(path), GGUFSource(path)
  fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
  assert {k: source.field(k) for k in source.header.keys} == fields
  assert len(source.names()) == len(reader.tensors) and source.unread == []
  stored = {t.name: t for t in reader.tensors}
  for own, name in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
    t = stored[f"blk.7.{name}.weight"]
    x = source.read(f"model.layers.7.{own}.weight")
    np.testing.assert_array_equal(x, gguf.dequantize(t.data, t.tensor_type))
  assert source.rope.theta == 1e5 and source.rope.original_context == 8192


# --- ropes ---------------------------------------------------------------------------------------


def rope_of(path, arch="qwen2", extra=(), head_dim=16, **fields):
  fields = {f"ARCH.rope.{k.replace('__', '.')}": v for k, v in fields.items()}
  fields["ARCH.context_length"] = fields.pop("ARCH.rope.context", 4096)
  return GGUFSource(model(path, arch, fields, extra, head_dim=head_dim)[1]).rope


def from_hf(head_dim=16, maximum=4096, **parameters):
  parameters = dict(rope_theta=5000.0) | parameters
  return rope.from_hf(
    dict(head_dim=head_dim, max_position_embeddings=maximum, rope_parameters=parameters)
  )


def assert_same(a, b):
  np.testing.assert_allclose(a.inv_freq, b.inv_freq, rtol=1e-6)
  assert math.isclose(a.attention_scale, b.attention_scale, rel_tol=1e-6)
  facts = ("theta", "original_context", "context", "head_dim", "rotary_dim")
  assert [getattr(a, f) for f in facts] == [getattr(b, f) for f in facts]
  assert [name for name, _ in a.history] == [name for name, _ in b.history]


SCALED = dict(scaling__factor=4.0, scaling__original_context_length=1024)
HF = dict(factor=4.0, original_max_position_embeddings=1024)
YARN = dict(SCALED, scaling__type="yarn")


@pytest.mark.parametrize(
  "fields, parameters",
  [
    ({}, dict(rope_type="default")),
    (dict(freq_base=None), dict(rope_type="default", rope_theta=10_000.0)),
    (dict(scaling__type="none", scaling__factor=1.0), dict(rope_type="default")),
    (dict(dimension_count=12), dict(rope_type="default", partial_rotary_factor=0.75)),
    (dict(SCALED, scaling__type="linear"), dict(HF, rope_type="linear")),
    (dict(scale_linear=2.0), dict(rope_type="linear", factor=2.0)),
    (YARN, dict(HF, rope_type="yarn")),
    (dict(YARN, scaling__finetuned=True), dict(HF, rope_type="yarn")),
    (
      dict(YARN, scaling__yarn_beta_fast=16.0, scaling__yarn_beta_slow=2.0),
      dict(HF, rope_type="yarn", beta_fast=16.0, beta_slow=2.0),
    ),
    (
      dict(YARN, scaling__attn_factor=0.5),  # a further factor, as llama.cpp multiplies
      dict(HF, rope_type="yarn", attention_factor=0.5 * (0.1 * math.log(4) + 1)),
    ),
    (dict(YARN, scaling__yarn_attn_factor=0.1 * math.log(4) + 1), dict(HF, rope_type="yarn")),
    (
      dict(YARN, scaling__yarn_log_multiplier=1.0),
      dict(HF, rope_type="yarn", mscale=1.0, mscale_all_dim=1.0),
    ),
  ],
)
def test_the_rope_is_that_of_the_same_hugging_face_config(tmp_path, fields, parameters):
  assert_same(rope_of(tmp_path, **fields), from_hf(**parameters))


def test_llama3_written_as_factors_gives_the_frequencies_of_llama3(tmp_path):
  theta, head_dim = 500_000.0, 128
  factors = []  # generate_extra_tensors of conversion/llama.py
  for freq in 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim):
    wavelength = 2 * math.pi / freq
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    middle = 1 / ((1 - smooth) / 8.0 + smooth)
    factors.append(1.0 if wavelength < 2048 else 8.0 if wavelength > 8192 else middle)
  assert len({round(f, 3) for f in factors}) > 5
  got = rope_of(
    tmp_path, "llama", {"rope_freqs.weight": np.array(factors, np.float32)}, head_dim,
    freq_base=theta, context=131072, dimension_count=128,
  )  # fmt: skip
  base = rope.base(head_dim=head_dim, theta=theta, original_context=8192)
  want = rope.llama3(base, 8.0, low_freq_factor=1.0, high_freq_factor=4.0)
  np.testing.assert_allclose(got.inv_freq, want.inv_freq, rtol=1e-6)
  assert got.attention_scale == 1.0 and got.context == 131072


def test_factors_scale_attention_only_if_the_file_says_so(tmp_path):
  extra = {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
  options = dict(scaling__original_context_length=1024)
  for more, scale in ({}, 1.0), (dict(scaling__attn_factor=1.25), 1.25):
    got = rope_of(tmp_path, "llama", extra, **options, **more)
    assert got.attention_scale == scale and got.original_context == 1024
    np.testing.assert_allclose(
      got.inv_freq * np.arange(1, 9), from_hf(rope_type="default").inv_freq
    )


@pytest.mark.parametrize("attention", [None, 1.5])
@pytest.mark.parametrize("kind", [None, "longrope"])
def test_phi3_factors_are_longrope(tmp_path, attention, kind):
  short, long = np.linspace(1, 2, 6), np.linspace(1, 30, 6)
  usual = math.sqrt(1 + math.log(4) / math.log(1024))
  lists = dict(short=short, long=long)
  got = rope_of(
    tmp_path, "phi3", {f"rope_factors_{n}.weight": np.float32(x) for n, x in lists.items()},
    dimension_count=12, scaling__original_context_length=1024, scaling__type=kind,
    scaling__attn_factor=float(attention or usual),
  )  # fmt: skip
  lists = dict(short_factor=short.tolist(), long_factor=long.tolist())
  lists |= {} if attention is None else dict(attention_factor=attention)
  want = from_hf(
    **HF | dict(factor=None), rope_type="longrope", partial_rotary_factor=0.75, **lists
  )
  assert_same(got, want)
  (_, ours), (_, theirs) = got.history[0], want.history[0]
  np.testing.assert_allclose(ours["long_factor"], theirs["long_factor"], rtol=1e-6)
  assert ours["attention"] == theirs["attention"]


ONES = np.ones(8, np.float32)
LONG = {"rope_factors_long.weight": ONES, "rope_factors_short.weight": ONES}
FREQS = {"rope_freqs.weight": ONES}


@pytest.mark.parametrize(
  "fields, extra, message",
  [
    (dict(scaling__type="ntk"), {}, "scaling.type='ntk'"),
    (dict(scaling__alpha=2.0), {}, "scaling.alpha"),
    (dict(dimension_sections=[2, 2, 2, 2]), {}, "dimension_sections"),
    (dict(scaling__factor=4.0), {}, "factor=4 has no meaning for scaling 'none'"),
    (dict(scaling__original_context_length=1024), {}, "original_context_length=1024 has no"),
    (dict(scaling__type="linear"), {}, "factor is missing"),
    (dict(YARN, scaling__original_context_length=None), {}, "original_context_length is missing"),
    (dict(YARN, scaling__original_context_length=8192), {}, "above max_position_embeddings"),
    (dict(YARN, scaling__factor=0.5), {}, "factor=0.5 must be at least 1"),
    (dict(YARN, scaling__factor="4"), {}, "factor='4' must be a number"),
    (dict(YARN, scaling__yarn_ext_factor=0.5), {}, "yarn_ext_factor"),
    (dict(YARN, scaling__yarn_attn_factor=1.0), {}, "yarn_attn_factor=1 is ambiguous"),
    (dict(YARN, scale_linear=2.0), {}, "scale_linear=2.0 and .* disagree"),
    (dict(scaling__type="linear", scaling__factor=4.0, scale_linear=2.0), {}, "disagree"),
    (dict(scaling__type="longrope"), {}, "without tensors of factors"),
    (dict(scaling__attn_factor=1.2), LONG, "original_context_length=None"),
    (dict(scaling__original_context_length=1024), LONG, "attn_factor is missing"),
    (YARN, LONG, "rope_factors_long with another scaling"),
    (YARN, FREQS, "rope_freqs with .*'yarn'"),
    ({}, LONG | FREQS, "rope_factors_long with another"),
    ({}, {"rope_factors_long.weight": ONES}, "only one"),
    ({}, {"rope_freqs.weight": ONES[:6]}, "8 pairs"),
    ({}, {"rope_freqs.weight": 0 * ONES}, "positive"),
    ({}, {"rope_freqs.weight": np.ones((2, 4), np.float32)}, "not one factor for each pair"),
    (dict(dimension_count=18), {}, "dimension_count=18"),
    (dict(freq_base=float("nan")), {}, "freq_base=nan"),
    (dict(freq_base=1.0), {}, "theta"),
  ],
)
def test_ropes_that_cannot_be_told_are_refused(tmp_path, fields, extra, message):
  with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
    rope_of(tmp_path, extra=extra, **fields)


# --- what is not understood ----------------------------------------------------------------------


def test_tensors_that_are_not_understood_are_listed(tmp_path):
  """Also those which another architecture would have, and those of layers that do not exist."""
  extra = ("blk.0.attn_q_norm.weight", "blk.2.attn_norm.weight", "output.bias", "blk.0.attn_sinks")
  extra += ("blk.0.attn_norm.bias", "blk.0.ffn_gate_exps.weight")
  _, path = model(tmp_path, "qwen2", extra={name: np.ones(8, np.float32) for name in extra})
  source = GGUFSource(path)
  assert source.unread == list(extra)
  with pytest.raises(ValueError, match="m.gguf: no tensor 'output.bias'"):
    source.read("output.bias")


@pytest.mark.parametrize(
  "fields, extra, message",
  [
    ({"general.architecture": "gpt2"}, {}, "architecture 'gpt2'"),
    ({"qwen2.expert_count": 8}, {}, "expert_count=8"),
    ({"qwen2.attention.scale": 0.5}, {}, "attention.scale=0.5"),
    ({"qwen2.attention.head_count": None}, {}, "no metadata 'qwen2.attention.head_count'"),
    ({"qwen2.attention.head_count": [4, 4]}, {}, r"head_count=\[4, 4\]"),
    ({"qwen2.attention.head_count_kv": 3}, {}, "4 heads over 3"),
    ({"qwen2.attention.value_length": 16}, {}, "different length"),
    ({"qwen2.block_count": 3}, {}, "2 of 3 layers"),
    ({"qwen2.feed_forward_length": 47}, {}, "has shape .* the metadata give"),
    ({"qwen2.attention.layer_norm_rms_epsilon": 2.0}, {}, "epsilon=2.0"),
    ({"split.count": 2}, {}, "one of several files"),
    ({"general.type": "adapter"}, {}, "'adapter' is not a model"),
    ({"general.quantization_version": 1}, {}, "quantization_version"),
    ({}, {"blk.0.attn_qkv.weight": np.ones((64, 32), np.float32)}, "twice, on its own and fused"),
    ({}, {"blk.1.attn_output.bias": np.ones(32, np.float32)}, "1 of 2 layers have .*o_proj.bias"),
  ],
)
def test_models_that_are_not_ours_are_refused(tmp_path, fields, extra, message):
  _, path = model(tmp_path, "qwen2", extra=extra)
  state = gguf_files.state(BIAS["qwen2"])
  fields = gguf_files.metadata("qwen2", **fields)
  arch = fields.pop("general.architecture", "qwen2")
  tensors = gguf_files.stored("qwen2", state) | extra
  gguf_files.write(path, arch, tensors, fields)
  with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
    GGUFSource(path)


def test_a_window_is_read(tmp_path):
  _, path = model(tmp_path, "phi3", {"ARCH.attention.sliding_window": 16})
  assert GGUFSource(path).hyperparameters["window"] == 16


def test_llama_rotates_whole_heads(tmp_path):
  with pytest.raises(ValueError, match="rotates all 16 channels"):
    rope_of(tmp_path, "llama", dimension_count=12)
