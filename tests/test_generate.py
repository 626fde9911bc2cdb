"""Generation: the cache is invisible, whatever the rope, the batch, the mesh."""

import functools

import jax
import numpy as np
import pytest
import tiny

from rope_jax import rope
from rope_jax.model.generate import Generator
from rope_jax.model.llama import unembedding
from rope_jax.train import sharding
from rope_jax.train.subject import _in_batches

L = 16  # original context: the prompts are on both sides of it when they are done
PROMPTS = [tiny.tokens(1, n, seed=n)[0] for n in (5, 9, 13)]
NEW = [tiny.tokens(1, 12, seed=100 + n)[0] for n in range(3)]
BY_LENGTH = sorted(n for n in rope.SCALINGS if "seq_len" in tiny.parameters(n))


def ropes(name):
  """Length -> rope, of any method."""
  base = tiny.base_rope(context=L)

  @functools.cache
  def of(n):
    return tiny.scaled(name, base, seq_len=n)

  return of


@functools.cache
def _generator(m, by_length, **options):
  return Generator(m, tiny.variables(m), None, depends_on_length=by_length, **options)


def generator(m, rope_of, by_length=True, chunk=8, **options):
  g = _generator(m, by_length, chunk=chunk, **options)  # compiled once
  g.rope_of = rope_of
  return g


@functools.lru_cache(maxsize=4)
def whole(m):
  """(tokens [B, T], rope) -> logits [B, T, V] of a forward pass without a cache."""
  v = tiny.variables(m)
  return jax.jit(lambda t, r: m.apply(v, t, r) @ unembedding(v["params"]))


def full_logits(m, rope_of, prompts, continuations):
  """What follows each prompt and part of its continuation, by forward passes of their own."""
  out = []
  for p, c in zip(prompts, continuations):
    text = np.concatenate([p, c])
    padded = np.pad(text, (0, 32 - len(text)))[None]  # causal: what comes after is not seen
    out.append([whole(m)(padded, rope_of(n))[0, n - 1] for n in range(len(p), len(text))])
  return np.asarray(out)


@pytest.mark.parametrize("name", sorted(rope.SCALINGS))
def test_cached_logits_are_those_of_the_whole_sequence(name):
  """At every length, across the switch of every method that depends on it."""
  m = tiny.model(clex=tuple(CLEX.items())) if name == "clex" else tiny.model()
  of = ropes(name) if name != "clex" else clex_ropes()
  g = generator(m, of, by_length=name in BY_LENGTH)
  expected = full_logits(m, of, PROMPTS, NEW)
  np.testing.assert_allclose(g.logits(PROMPTS, NEW), expected, atol=1e-4, rtol=1e-4)
  if name in BY_LENGTH:  # the lengths on both sides of the switch do differ
    fixed = full_logits(m, lambda n: of(5), PROMPTS, NEW)
    assert np.abs(fixed - expected).max() > 1e-2


CLEX = dict(max_factor=4, activation="tanh", time_step=0.05, param_factor=1)


def clex_ropes():
  options = {k: v for k, v in CLEX.items() if k in tiny.parameters("clex")}
  base = tiny.base_rope(context=L)
  return functools.cache(lambda n: rope.clex(base, seq_len=n, **options))


PHASES = [
  dict(phase="psc"),
  dict(phase="psc", psc_calibration="post"),
  dict(phase="psc", psc_share="all"),
  dict(phase="psc_rotation", psc_bound=1.0),
]


@pytest.mark.parametrize("phase", PHASES)
def test_the_learned_phase_is_cached(phase):
  m, of = tiny.model(lora_rank=2, num_layers=2, **phase), ropes("longrope")
  expected = full_logits(m, of, PROMPTS, NEW)
  np.testing.assert_allclose(generator(m, of).logits(PROMPTS, NEW), expected, atol=1e-4, rtol=1e-4)


def test_capacity_is_the_rope_of_what_the_sequence_will_have_become():
  m, of = tiny.model(), ropes("dynamic_ntk")
  got = generator(m, of, on_change="capacity").logits(PROMPTS, NEW)
  for row, p, c in zip(got, PROMPTS, NEW):
    last = of(len(p) + len(c))
    expected = full_logits(m, lambda _, r=last: r, [p], [c])[0]
    np.testing.assert_allclose(row, expected, atol=1e-4, rtol=1e-4)


CASES = [(name, {}) for name in BY_LENGTH] + [("longrope", phase) for phase in PHASES[1:3]]


@pytest.mark.parametrize("name, phase", CASES)
def test_keys_rotated_on_read_are_exact_in_one_layer(name, phase):
  if name == "clex":
    phase = dict(phase, clex=tuple(CLEX.items()))
  m, of = tiny.model(num_layers=1, **phase), clex_ropes() if name == "clex" else ropes(name)
  g = generator(m, of, on_change="rotate")
  expected = full_logits(m, of, PROMPTS, NEW)
  np.testing.assert_allclose(g.logits(PROMPTS, NEW), expected, atol=1e-4, rtol=1e-4)


def test_keys_rotated_on_read_are_not_exact_in_deeper_layers():
  """Their hidden states were made under another rope: why 'recompute' is the default."""
  m, of = tiny.model(), ropes("dynamic_ntk")
  off = generator(m, of, on_change="rotate").logits(PROMPTS, NEW)
  off = np.abs(off - full_logits(m, of, PROMPTS, NEW)).max(axis=(0, 2))
  assert off[0] < 1e-4 and off[-1] > 1e-2
  m, of = tiny.model(), ropes("yarn")  # nothing depends on the length: nothing changes
  g = generator(m, of, by_length=False, on_change="rotate")
  np.testing.assert_allclose(g.logits(PROMPTS, NEW), full_logits(m, of, PROMPTS, NEW), atol=1e-4)


def test_layers_with_factors_of_their_own():
  m, base = tiny.model(), tiny.base_rope(context=L)
  factors = tuple(map(tuple, 1 + np.random.default_rng(0).uniform(0, 3, (3, 8))))

  @functools.cache
  def of(n):
    return rope.longrope(base, 2.0, seq_len=n, long_factor=factors, start_tokens=4)

  expected = full_logits(m, of, PROMPTS, NEW)
  np.testing.assert_allclose(generator(m, of).logits(PROMPTS, NEW), expected, atol=1e-4, rtol=1e-4)


KERNELS = [
  dict(attention="dense"),
  dict(attention="splash_interpret"),
  dict(attention="splash_interpret", block_q=512, block_k=512),  # made for the lengths of training
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_kernels_prefill(kernel):
  m, of = tiny.model(**kernel), ropes("yarn")
  g = generator(m, of, by_length=False)
  expected = full_logits(tiny.model(), of, PROMPTS, NEW)
  np.testing.assert_allclose(g.logits(PROMPTS, NEW), expected, atol=1e-4, rtol=1e-4)


MESHES = [
  dict(fsdp=2, context=2, tensor=2),
  pytest.param(dict(data=2, fsdp=2, context=2), marks=pytest.mark.long),
  pytest.param(dict(context=4, tensor=2), marks=pytest.mark.long),
  pytest.param(dict(context=8), marks=pytest.mark.long),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_changes_nothing(mesh):
  """Prompts of different lengths, rows that divide the devices and rows that do not."""
  m, of = tiny.model(phase="psc", vocab_size=64, num_layers=2), ropes("longrope")
  prompts, new = [*PROMPTS, PROMPTS[0]], [*NEW, NEW[0]]
  expected, free = full_logits(m, of, prompts, new)[:, :5], generator(m, of)(prompts, 20)
  mesh = tiny.mesh(**mesh)
  v = jax.device_put(tiny.variables(m), sharding.shardings(mesh, tiny.variables(m)))
  with jax.set_mesh(mesh):
    g = Generator(m, v, of, depends_on_length=True, chunk=8)
    assert len(g._empty(np.zeros(4, np.int32), 64).k.sharding.device_set) == 8
    got = g.logits(prompts, [c[:5] for c in new])
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    decode, whole = g._decode, []

    def watched(*given):
      out = decode(*given)
      whole.extend(x.sharding.is_fully_replicated for x in out[1:])
      return out

    g._decode = watched
    for rows in (3, 4):
      for a, b in zip(g(prompts[:rows], 20), free):
        np.testing.assert_array_equal(a, b)
    assert all(whole)  # or other processes could not read them
    assert decode._cache_size() == 2  # a program for each number of rows


def greedy(m, of, prompt, n):
  for _ in range(n):
    logits = full_logits(m, of, [prompt], [[0]])[0, 0]
    prompt = np.append(prompt, logits.argmax())
  return prompt[-n:]


@pytest.mark.parametrize("name", ["none", "longrope", "dynamic_ntk"])
def test_greedy_is_the_most_likely_token_after_token(name):
  m, of = tiny.model(), ropes(name)
  g = generator(m, of, by_length=name in BY_LENGTH)
  one, many = g(PROMPTS, 1), g(PROMPTS, 18)
  for first, got, prompt in zip(one, many, PROMPTS):
    np.testing.assert_array_equal(got, greedy(m, of, prompt, 18))
    assert first.tolist() == got[:1].tolist()


def test_generation_ends_at_a_stop_token_or_when_told():
  g = generator(tiny.model(), ropes("yarn"), by_length=False)
  free = g(PROMPTS, 40)
  stop = free[1][20]
  stopped = g(PROMPTS, 40, stop=[int(stop)])
  for a, b in zip(free, stopped):
    end = np.flatnonzero(a == stop)[0] if stop in a else len(a)
    np.testing.assert_array_equal(b, a[:end])
  told = g(PROMPTS, 40, until=lambda i, new: len(new) >= 3)
  assert {len(x) for x in told} < set(range(3, 40))
  for a, b in zip(free, told):
    np.testing.assert_array_equal(b, a[: len(b)])


def test_samples_follow_the_distribution():
  m, of = tiny.model(), ropes("none")
  g, n = generator(m, of, by_length=False), 512
  logits = full_logits(m, of, PROMPTS[:1], [[0]])[0, 0]
  draws = [
    int(x[0])
    for seed in range(5)
    for x in g(PROMPTS[:1] * n, 1, temperature=2.0, top_p=0.8, seed=seed)
  ]
  p = np.exp(logits / 2 - np.logaddexp.reduce(logits / 2))
  order = np.argsort(-p)
  nucleus = order[: np.searchsorted(np.cumsum(p[order]), 0.8) + 1]
  assert set(draws) <= set(nucleus.tolist()) and len(set(draws)) > len(nucleus) / 2
  share = np.bincount(draws, minlength=61)[nucleus] / len(draws)
  expected = p[nucleus] / p[nucleus].sum()
  assert np.abs(share - expected).max() < 5 * np.sqrt(expected.max() / len(draws))
  same = [g(PROMPTS, 9, temperature=1.0, seed=7) for _ in range(2)]
  assert all((a == b).all() for a, b in zip(*same))
  other = g(PROMPTS, 9, temperature=1.0, seed=8)
  assert any((a != b).any() for a, b in zip(same[0], other))
  np.testing.assert_array_equal(g(PROMPTS, 9, temperature=1.0, top_p=1e-6), g(PROMPTS, 9))


def test_each_prompt_has_an_end_of_its_own():
  g = generator(tiny.model(), ropes("yarn"), by_length=False)
  asked = []
  g(PROMPTS, 40, until=lambda i, new: asked.append((i, len(new))) or len(new) >= 10 * i)
  assert max(n for _, n in asked) == 1 + 16 + 16
  assert {i for i, _ in asked} == {0, 1, 2}


def test_rows_without_a_token_are_never_made():
  g = generator(tiny.model(), ropes("none"), by_length=False)
  some = generator(tiny.model(), ropes("none"), by_length=False, vocab_size=20)
  assert max(x.max() for x in g(PROMPTS, 20)) >= 20
  assert max(x.max() for x in some(PROMPTS, 20)) < 20
  assert max(x.max() for x in some(PROMPTS, 20, temperature=5.0)) < 20


def test_settings_out_of_range_are_refused():
  g = generator(tiny.model(), ropes("none"), by_length=False)
  for given, message in (
    (dict(temperature=-1.0), "temperature=-1"),
    (dict(top_p=0.0), "top_p=0"),
    (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(prompts=[[]]), "token to start from"),
  ):
    with pytest.raises(ValueError, match=message):
      g(**{**dict(prompts=PROMPTS, max_new_tokens=2), **given})
  with pytest.raises(ValueError, match="on_change='forget'.*recompute"):
    generator(tiny.model(), ropes("none"), on_change="forget")


def test_every_sample_has_randomness_of_its_own():
  g = generator(tiny.model(), ropes("none"), by_length=False)
  assert len(set(g(PROMPTS[:1], 17, temperature=1e4)[0].tolist())) > 8  # nearly uniform, of 61


def test_keys_rotated_on_read_have_the_rope_of_each_step():
  m, of = tiny.model(num_layers=1), ropes("dynamic_ntk")
  for got, prompt in zip(generator(m, of, on_change="rotate")(PROMPTS, 18), PROMPTS):
    np.testing.assert_array_equal(got, greedy(m, of, prompt, 18))


def test_each_prompt_gets_its_own_continuation_and_fillers_are_not_waited_for():
  enough = []

  def echo(rows, until, progress):
    enough.append([until(i, row) for i, row in enumerate(rows)])
    return [row[:1] for row in rows]

  prompts = [np.full(n, n, np.int32) for n in (3, 9, 5, 7, 1)]
  found = _in_batches(echo, prompts, 2, "", None)
  assert [x.tolist() for x in found] == [[3], [9], [5], [7], [1]]
  assert enough == [[False, False], [False, False], [False, True]]
