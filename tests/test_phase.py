import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rope_jax import rope


def weights(scale, heads=3, d=16):
  up, down = scale * jax.random.normal(jax.random.key(1), (2, heads, d, d))
  return dict(up=up, down=down)


X = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))


@pytest.mark.parametrize("scale", ["released", "fan_in"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_at_init_bit_for_bit(scale, dtype):
  p = rope.psc_init(jax.random.key(0), 3, 16, scale)
  x = X.astype(dtype)
  np.testing.assert_array_equal(rope.psc(x, p["up"], p["down"]), x)


@pytest.mark.parametrize("scale, bound", [("released", 1 / 64), ("fan_in", 1 / 8)])
def test_initial_scales(scale, bound):
  p = rope.psc_init(jax.random.key(0), 8, 64, scale)
  assert not p["up"].any()
  assert 0.99 * bound < np.abs(p["down"]).max() <= bound
  np.testing.assert_allclose(p["down"].std(), bound / np.sqrt(3), rtol=0.02)


def test_equals_the_formula_head_by_head():
  p = weights(0.5)
  got = rope.psc(X, p["up"], p["down"])
  for h in range(3):
    x = np.asarray(X[:, :, h], np.float64)
    z = x @ np.asarray(p["up"][h], np.float64)
    y = (z / (1 + np.exp(-z))) @ np.asarray(p["down"][h], np.float64)
    np.testing.assert_allclose(got[:, :, h], x * (1 + np.tanh(y) / 2), rtol=1e-4, atol=1e-6)


def test_gate_is_within_a_half_and_turns_no_pair_by_30_degrees():
  p = weights(100.0)
  g = np.asarray(rope.psc_gate(X, p["up"], p["down"]))
  assert g.min() >= 0.5 and g.max() <= 1.5 and g.std() > 0.1
  y = np.asarray(X * g)
  before = np.angle(np.asarray(X)[..., :8] + 1j * np.asarray(X)[..., 8:])
  after = np.angle(y[..., :8] + 1j * y[..., 8:])
  turn = np.abs((after - before + np.pi) % (2 * np.pi) - np.pi)
  assert 10 < np.degrees(turn.max()) <= 30.001


def test_at_init_only_up_has_a_gradient():
  p = rope.psc_init(jax.random.key(0), 3, 16)
  grads = jax.grad(lambda p: (rope.psc(X, p["up"], p["down"]) ** 2).sum())(p)
  assert np.abs(grads["up"]).max() > 0
  assert not grads["down"].any()


def test_parameter_count():
  assert rope.psc_parameter_count(32, 32, 32, 128) == 67_108_864  # Llama-2 7B
  assert rope.psc_parameter_count(40, 40, 40, 128) == 104_857_600  # Llama-2 13B
  assert rope.psc_parameter_count(32, 32, 8, 128) == 41_943_040  # Mistral 7B
  phase = tiny.variables(tiny.model(phase="psc"))["phase"]
  assert sum(x.size for x in jax.tree.leaves(phase)) == rope.psc_parameter_count(3, 4, 2, 16)


ROTATED = dict(up=weights(0.5)["up"], down=weights(0.5)["down"][..., :8])


def turned(x, y):
  """Angle of each pair of y against that of x, in (-pi, pi]."""
  a, b = (np.asarray(v)[..., :8] + 1j * np.asarray(v)[..., 8:] for v in (x, y))
  return np.angle(b / a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_is_the_identity_at_init_bit_for_bit(dtype):
  p = rope.psc_init(jax.random.key(0), 3, 16, outputs=8)
  assert p["down"].shape == (3, 16, 8)
  x = X.astype(dtype)
  np.testing.assert_array_equal(rope.psc_rotation(x, p["up"], p["down"]), x)


@pytest.mark.parametrize("bound", [np.pi, 0.3, None])
def test_rotation_turns_each_pair_by_the_angle_of_the_formula_and_keeps_lengths(bound):
  got = rope.psc_rotation(X, ROTATED["up"], ROTATED["down"], bound=bound)
  z = np.einsum("...hd,hdr->...hr", X, ROTATED["up"])
  angle = np.einsum("...hr,hrp->...hp", z / (1 + np.exp(-z)), ROTATED["down"])
  angle = angle if bound is None else bound * np.tanh(angle)
  off = turned(X, got) - angle
  np.testing.assert_allclose((off + np.pi) % (2 * np.pi) - np.pi, 0, atol=1e-3)
  length = lambda x: np.hypot(x[..., :8], x[..., 8:])  # noqa: E731
  np.testing.assert_allclose(length(got), length(X), rtol=1e-4)
  assert np.abs(turned(X, got)).max() > (0.29 if bound == 0.3 else np.radians(60))


def test_rotation_before_and_after_rope_is_the_same():
  r = tiny.base_rope()
  cos, sin = rope.cos_sin(r, jnp.arange(5))
  before = rope.rotate(rope.psc_rotation(X, ROTATED["up"], ROTATED["down"]), cos, sin)
  angle_after = turned(rope.rotate(X, cos, sin), before)
  np.testing.assert_allclose(
    np.exp(1j * angle_after),
    np.exp(1j * turned(X, rope.psc_rotation(X, ROTATED["up"], ROTATED["down"]))),
    atol=1e-3,
  )


@pytest.mark.parametrize("phase", ["psc", "psc_rotation"])
@pytest.mark.parametrize("share", ["none", "heads", "layers", "all"])
def test_parameters_are_shared_as_said(phase, share):
  phase_tree = tiny.variables(tiny.model(phase=phase, psc_share=share))["phase"]
  heads = {k: 1 if share in ("heads", "all") else n for k, n in (("psc_q", 4), ("psc_k", 2))}
  lead = () if share in ("layers", "all") else (3,)
  tree = phase_tree if share in ("layers", "all") else phase_tree["layers"]["attention"]
  for name, h in heads.items():
    assert tree[name]["up"].shape == (*lead, h, 16, 16)
    assert tree[name]["down"].shape == (*lead, h, 16, 16 if phase == "psc" else 8)
  if phase == "psc":
    count = sum(x.size for x in jax.tree.leaves(phase_tree))
    assert count == rope.psc_parameter_count(3, 4, 2, 16, share)


@pytest.mark.parametrize("phase, share", [("psc", "heads"), ("psc_rotation", "all")])
def test_shared_parameters_are_the_identity_at_init_and_all_of_them_learn(phase, share):
  m, tokens = tiny.model(phase=phase, psc_share=share, remat="none"), tiny.tokens()
  v = tiny.initial(m)
  plain = jax.jit(tiny.model().apply)(dict(params=v["params"]), tokens, tiny.base_rope())
  np.testing.assert_array_equal(jax.jit(m.apply)(v, tokens, tiny.base_rope()), plain)
  v = tiny.variables(m)
  loss = jax.jit(jax.grad(lambda p: m.apply({**v, "phase": p}, tokens, tiny.base_rope()).std()))
  assert all((jnp.abs(g) > 0).any() for g in jax.tree.leaves(loss(v["phase"])))


def test_sharing_over_layers_is_equal_parameters_in_each():
  shared, own = (tiny.model(phase="psc", psc_share=s) for s in ("layers", "none"))
  v = tiny.variables(shared)
  copied = jax.tree.map(lambda x: jnp.stack([x] * 3), v["phase"])
  got = jax.jit(shared.apply)(v, tiny.tokens(), tiny.base_rope())
  expected = jax.jit(own.apply)(
    dict(v, phase=dict(layers=dict(attention=copied))), tiny.tokens(), tiny.base_rope()
  )
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_unknown_initial_scale_is_refused():
  with pytest.raises(ValueError, match="psc.init.*'big'"):
    rope.psc_init(jax.random.key(0), 1, 4, "big")


def test_calibration_before_and_after_rotation_differ():
  m = {k: tiny.model(phase="psc", psc_calibration=k) for k in ("pre", "post")}
  v = tiny.variables(m["pre"])
  out = {k: jax.jit(m[k].apply)(v, tiny.tokens(), tiny.base_rope()) for k in m}
  assert jnp.abs(out["pre"] - out["post"]).max() > 1e-3


def test_post_calibration_gate_reads_a_detached_copy():
  """The gradient through the rotated vector passes by the product alone, not by the gate."""
  m = tiny.model(phase="psc", psc_calibration="post", num_layers=1)
  v = tiny.variables(m)
  t = tiny.tokens(1, 6)
  q = v["params"]["layers"]["attention"]["q"]
  direction = jax.random.normal(jax.random.key(5), q.shape)

  @jax.jit
  def loss(step):
    params = jax.tree.map(lambda x: x, v["params"])
    params["layers"]["attention"]["q"] = q + step * direction
    return m.apply(dict(v, params=params), t, tiny.base_rope()).std()

  numeric = (loss(1e-2) - loss(-1e-2)) / 2e-2
  assert abs(float(jax.grad(loss)(0.0)) - float(numeric)) > 1e-2 * abs(float(numeric))
