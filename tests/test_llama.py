import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import presets, rope
from rope_jax.model import config as model_config
from rope_jax.model.config import from_config
from rope_jax.model.llama import REMAT_POLICIES, Llama, unembedding

LORA_PSC = dict(lora_rank=4, phase="psc")


@functools.partial(jax.jit, static_argnums=0)
def apply(m, v, tokens, r=None, **inputs):
  return m.apply(v, tokens, r or tiny.base_rope(), **inputs)


def logits(m, v, *args, **inputs):
  return apply(m, v, *args, **inputs) @ unembedding(v["params"])


@functools.partial(jax.jit, static_argnums=0)
def input_gradient(m, v, tokens, output, **inputs):
  """|d (sum of the hidden state at `output`) / d (embedding of each input token)|, [L]."""
  table = v["params"]["embedding"][tokens[0]]  # each token gets a row of its own

  def hidden(table):
    own = dict(v, params=dict(v["params"], embedding=table))
    ids = jnp.arange(tokens.shape[1])[None]
    return m.apply(own, ids, tiny.base_rope(), **inputs)[0, output].sum()

  return jnp.abs(jax.grad(hidden)(table)).sum(-1)


@pytest.mark.parametrize("attention", ["dense", "blockwise", "splash_interpret"])
def test_causality_gradient_is_exactly_zero(attention):
  m = tiny.model(attention=attention, vocab_size=24, **LORA_PSC)
  v = tiny.variables(m)
  for t in (0, 7, 8, 15, 23):
    gradient = input_gradient(m, v, tiny.tokens(1, 24, vocab=24), t)
    assert (gradient[: t + 1] > 0).all()
    assert (gradient[t + 1 :] == 0).all()


@pytest.mark.parametrize("attention", ["dense", "blockwise", "splash_interpret"])
def test_packed_documents_do_not_see_each_other(attention):
  m = tiny.model(attention=attention, vocab_size=24, **LORA_PSC)
  v = tiny.variables(m)
  tokens = tiny.tokens(1, 24, vocab=24)
  positions = np.concatenate([np.arange(10), np.arange(14)])[None].astype(np.int32)
  segments = np.repeat([0, 1], [10, 14])[None].astype(np.int32)
  inputs = dict(positions_BxL=positions, segment_ids_BxL=segments)
  assert (input_gradient(m, v, tokens, 23, **inputs)[:10] == 0).all()
  packed = logits(m, v, tokens, **inputs)
  alone = [logits(m, v, part) for part in (tokens[:, :10], tokens[:, 10:])]
  np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=1e-5)


def test_output_depends_on_relative_position_only():
  m = tiny.model(**LORA_PSC)
  v, tokens = tiny.variables(m), tiny.tokens()
  positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
  far = logits(m, v, tokens, positions_BxL=positions + 1_000_000)
  np.testing.assert_allclose(logits(m, v, tokens), far, atol=2e-3)
  stretched = logits(m, v, tokens, positions_BxL=positions * 3)
  assert np.abs(logits(m, v, tokens) - stretched).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_and_psc_are_the_identity_at_init_bit_for_bit(dtype):
  with_adapters = tiny.model(dtype=dtype, lora_targets=model_config.LINEARS, **LORA_PSC)
  v = tiny.initial(with_adapters)
  assert set(v) == {"params", "lora", "phase"}
  base = tiny.model(dtype=dtype)
  tokens = tiny.tokens()
  np.testing.assert_array_equal(
    apply(with_adapters, v, tokens), apply(base, dict(params=v["params"]), tokens)
  )
  changed = tiny.variables(with_adapters)
  for name in ("lora", "phase"):
    some = {**v, name: changed[name]}
    difference = apply(with_adapters, some, tokens) - apply(base, dict(params=v["params"]), tokens)
    assert np.abs(difference).max() > 0, name


@pytest.mark.parametrize("target", model_config.LINEARS)
def test_lora_equals_the_merged_weight(target):
  m = tiny.model(lora_rank=3, lora_alpha=6.0, lora_targets=(target,))
  v = tiny.variables(m)
  module = "attention" if target in "qkvo" else "mlp"
  ab = v["lora"]["layers"][module][target]
  merged = jax.tree.map(lambda x: x, v["params"])
  weight = merged["layers"][module][target]
  delta = jnp.einsum("nir,nro->nio", ab["a"].reshape(3, -1, 3), ab["b"].reshape(3, 3, -1))
  merged["layers"][module][target] = weight + 2.0 * delta.reshape(weight.shape)
  expected = logits(tiny.model(), dict(params=merged), tiny.tokens())
  np.testing.assert_allclose(logits(m, v, tiny.tokens()), expected, rtol=2e-4, atol=2e-4)


def test_a_new_rope_does_not_recompile_the_model():
  m = tiny.model()
  v, tokens = tiny.variables(m), tiny.tokens()
  f = jax.jit(lambda v, t, r: m.apply(v, t, r))
  base = tiny.base_rope()
  outputs = [
    f(v, tokens, r) for r in (base, rope.pi(base, 2.0), rope.yarn(base, 4.0), rope.resonance(base))
  ]
  assert f._cache_size() == 1
  assert len({np.asarray(o).tobytes() for o in outputs}) == 4


def products_in_the_gradient(remat):
  m = tiny.model(remat=remat)
  v, tokens = tiny.initial(m), tiny.tokens()
  loss = jax.grad(lambda v: m.apply(v, tokens, tiny.base_rope()).sum())
  return jax.jit(loss)(v), str(jax.make_jaxpr(loss)(v)).count("dot_general")


def test_remat_policies_trade_memory_for_products_and_change_no_gradient():
  assert set(REMAT_POLICIES) == set(model_config.REMAT)
  runs = {name: products_in_the_gradient(name) for name in model_config.REMAT}
  for name, (grads, _) in runs.items():
    if name != "none":  # what is computed again is the same, bit for bit
      jax.tree.map(np.testing.assert_array_equal, grads, runs["full"][0])
  # Against `none`, XLA for CPU may fuse the multiplications and additions of a rotation in another
  # way. Entries of these gradients are sums of terms up to a thousand times as large, of either
  # sign: what is rounded is rounded at the size of those.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max()),
    runs["full"][0],
    runs["none"][0],
  )
  products = {name: n for name, (_, n) in runs.items()}
  order = ("matmuls", "qkv", "attention", "full")
  assert all(products[a] < products[b] for a, b in itertools.pairwise(order)), products
  assert products["matmuls"] == products["none"]  # nothing is computed twice
  assert products["offload"] == products["matmuls"]


def test_bfloat16_compute_is_close_to_float32():
  m32, m16 = tiny.model(**LORA_PSC), tiny.model(dtype="bfloat16", **LORA_PSC)
  v = tiny.initial(m32)
  a, b = (apply(m, v, tiny.tokens()) for m in (m32, m16))
  assert b.dtype == jnp.bfloat16
  np.testing.assert_allclose(a, b.astype(jnp.float32), atol=0.06)


def test_embeddings_are_tied_or_not():
  tied, untied = (tiny.initial(tiny.model(tie_embeddings=t))["params"] for t in (True, False))
  assert "lm_head" not in tied and untied["lm_head"].shape == (32, 61)
  np.testing.assert_array_equal(unembedding(tied), tied["embedding"].T)
  np.testing.assert_array_equal(unembedding(untied), untied["lm_head"])


def test_rope_for_another_head_dim_is_refused():
  m = tiny.model()
  with pytest.raises(ValueError, match="head_dim 32"):
    m.apply(tiny.initial(m), tiny.tokens(), rope.base(head_dim=32, theta=1e4, original_context=64))


@pytest.mark.slow
def test_frequencies_have_the_same_derivative_compiled_or_not():
  # The compiler once fused it with others of a real size into something else.
  c = presets.tiny()
  c.model.attention = "dense"
  m, base = Llama(from_config(c)), rope.base(head_dim=48, theta=1e4, original_context=128)
  init = jax.jit(lambda: m.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), base))
  variables, tokens = dict(init()), tiny.tokens(1, 1024, vocab=256)
  weights = jnp.arange(1, 145)

  def loss(factors):
    r = base.with_inv_freq(jnp.asarray(base.inv_freq, jnp.float32) / factors)
    return jnp.sum(jnp.sin(m.apply(variables, tokens, r) * weights))

  factors = jnp.full(24, 2.0)
  expected = jax.grad(loss)(factors)
  np.testing.assert_allclose(
    jax.jit(jax.grad(loss))(factors), expected, atol=1e-4 * np.abs(expected).max()
  )
