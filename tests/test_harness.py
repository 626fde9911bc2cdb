"""The model that lm_eval sees, against log-softmax computed directly."""

import functools

import jax
import numpy as np
import pytest
import tiny

from rope_jax import config, resolve
from rope_jax.data.tokenizer import ByteTokenizer
from rope_jax.evals.harness_generation import Generation, generation
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama, unembedding
from rope_jax.train import sharding
from rope_jax.train import subject as subject_lib

pytest.importorskip("lm_eval")

CONTEXT = 48


class Letters(ByteTokenizer):
  """A token a character, each of which is a text of its own; 0 ends a text."""

  eos_id = 0

  def encode(self, text):
    return np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int32)

  def decode(self, ids):
    return bytes(int(i) for i in ids).decode("latin-1")


class WithBos(Letters):
  bos_id = 1
  adds_bos = True


def tiny_config(**rope):
  c = config.base()
  c.tokenizer = "byte"
  c.mesh.data = 1
  c.rope.original_context = c.rope.context = CONTEXT
  c.rope.update(rope)
  return c


@functools.cache
def parts(scaling="none"):
  """(config, model, its variables); dynamic methods from a quarter of the context on."""
  c = tiny_config(scaling=scaling, original_context=CONTEXT // (1 if scaling == "none" else 4))
  model = Llama(from_config(c))
  return c, model, tiny.variables(model)


@functools.cache
def subject(scaling="none", tokenizer=Letters):
  c, model, variables = parts(scaling)
  mesh = sharding.make_mesh(c.mesh, 1)
  return subject_lib.make(c, mesh, model, tokenizer())(variables)


@pytest.fixture(autouse=True)
def _mesh():
  c = parts()[0]
  with jax.set_mesh(sharding.make_mesh(c.mesh, 1)):
    yield


def lm(of=None, **options):
  from rope_jax.evals.harness_model import RopeJaxLM

  return RopeJaxLM(of or subject(), **options)


def asked(*arguments, kind="loglikelihood", task="t"):
  from lm_eval.api.instance import Instance

  return [Instance(kind, {}, args, i, metadata=(task, i, 1)) for i, args in enumerate(arguments)]


@functools.cache
def _forward(model):
  return jax.jit(
    lambda variables, tokens, r: jax.nn.log_softmax(
      model.apply(variables, tokens, r) @ unembedding(variables["params"])
    )
  )


def log_probabilities(ids, scaling="none"):
  """[L, V] after each of these tokens, in one pass under the rope of their number."""
  c, model, variables = parts(scaling)
  r = resolve.rope(c, len(ids)) if scaling != "none" else resolve.rope(c)
  return np.asarray(_forward(model)(variables, np.asarray([ids], np.int32), r)[0], np.float64)


def directly(ids, new, scaling="none"):
  """(log-probability of the last `new` tokens, whether each is the likeliest)."""
  p = log_probabilities(ids[:-1], scaling)[-new:]
  target = np.asarray(ids[-new:])
  return p[np.arange(new), target].sum(), bool((p.argmax(-1) == target).all())


def likeliest(ids, new):
  """The ids that greedy decoding continues with, at one shape: each would compile again."""
  ids = list(ids)
  for _ in range(new):
    padded = ids + [0] * (CONTEXT - len(ids))
    ids.append(int(log_probabilities(padded)[len(ids) - 1].argmax()))
  return ids[-new:]


def text(n, seed=0):
  return "".join(chr(97 + i) for i in np.random.default_rng(seed).integers(0, 26, n))


PAIRS = [(text(n, n), text(m, m + 99)) for n, m in [(9, 1), (20, 7), (3, 12), (30, 2), (1, 3)]]


# ---- Scores.


def test_loglikelihood_is_the_sum_of_log_probabilities():
  for (before, after), (score, greedy) in zip(PAIRS, lm().loglikelihood(asked(*PAIRS))):
    expected, same = directly(Letters().encode(before + after).tolist(), len(after))
    assert score == pytest.approx(expected, abs=1e-3) and greedy is same


def test_greedy_is_what_greedy_decoding_gives():
  before = text(10)
  best = likeliest(Letters().encode(before), 4)
  worse = [*best[:2], (best[2] + 1) % 256, best[3]]
  requests = asked(*[(before, Letters().decode(ids)) for ids in (best, best[:1], worse)])
  assert [greedy for _, greedy in lm().loglikelihood(requests)] == [True, True, False]


@pytest.mark.parametrize("scaling", ["none", "dynamic_ntk"])
def test_neither_batch_size_nor_order_matters(scaling):
  of = subject(scaling)
  alone = [lm(of).loglikelihood(asked(pair))[0] for pair in PAIRS]
  assert len({round(score, 2) for score, _ in alone}) == len(PAIRS)
  for size in (1, 2, 4):
    for step in (1, -1):
      found = lm(of, batch_size=size).loglikelihood(asked(*PAIRS[::step]))[::step]
      np.testing.assert_allclose([x for x, _ in found], [x for x, _ in alone], atol=1e-3)
      assert [g for _, g in found] == [g for _, g in alone]


def test_a_rope_that_depends_on_the_length_is_that_of_the_sequence_and_not_of_its_padding():
  found = lm(subject("dynamic_ntk"), batch_size=4).loglikelihood(asked(*PAIRS))
  for (before, after), (score, _) in zip(PAIRS, found):
    ids = Letters().encode(before + after).tolist()
    assert score == pytest.approx(directly(ids, len(after), "dynamic_ntk")[0], abs=1e-3)
  c = parts("dynamic_ntk")[0]
  assert (resolve.rope(c, 20).inv_freq != resolve.rope(c, 40).inv_freq).any()


def test_lengths_are_padded_to_few_sizes():
  sizes = {lm(max_length=8192)._width(n) for n in range(2, 8194)}
  assert len(sizes) <= 16
  assert lm(max_length=8192)._width(8193) <= 1.125 * 8192
  assert all(lm(max_length=8192)._width(n) >= n for n in range(2, 8194))


def test_an_empty_context_is_the_end_of_a_text():
  score, _ = lm().loglikelihood(asked(("", "abc")))[0]
  assert score == pytest.approx(directly([0, *b"abc"], 3)[0], abs=1e-3)
  score, _ = lm().loglikelihood(asked(("", "\0abc")))[0]  # it is there already
  assert score == pytest.approx(directly([0, *b"abc"], 3)[0], abs=1e-3)


def test_bos_precedes_a_text_once_where_the_tokenizer_adds_it():
  model = lm(subject(tokenizer=WithBos))
  assert model.tok_encode("ab") == model.tok_encode("\1ab") == [1, *b"ab"]
  assert model.tok_encode("ab", add_special_tokens=False) == [*b"ab"]
  assert lm().tok_encode("ab") == [*b"ab"]
  for before in ("abc", ""):
    score, _ = model.loglikelihood(asked((before, "de")))[0]
    assert score == pytest.approx(directly([1, *before.encode(), *b"de"], 2)[0], abs=1e-3)


def test_what_is_too_long_loses_its_start_and_is_counted():
  model = lm(max_length=16)
  pairs = [(text(14), text(3, 1)), (text(15), text(3, 2)), (text(2), text(3, 3))]
  found = model.loglikelihood(asked(*pairs, task="cut"))
  for (before, after), (score, _) in zip(pairs, found):
    ids = Letters().encode(before + after).tolist()[-17:]  # 16 go in, the last is only scored
    assert score == pytest.approx(directly(ids, 3)[0], abs=1e-3)
  assert model.truncated == {"cut": 1}


@pytest.mark.parametrize("pair", [("ab", ""), ("ab", text(17)), ("  ", "")])
def test_what_cannot_be_scored_is_an_error(pair):
  with pytest.raises(ValueError, match="max_length=16"):
    lm(max_length=16).loglikelihood(asked(pair))


def test_rolling_is_one_pass_over_what_fits():
  for n in (1, 16):
    (score,) = lm(max_length=16).loglikelihood_rolling(asked((text(n),)))
    assert score == pytest.approx(directly([0, *text(n).encode()], n)[0], abs=2e-3)


def test_rolling_scores_each_token_once_in_windows_as_full_as_can_be():
  ids, W = [0, *text(41).encode()], 16
  expected = sum(
    directly(ids[max(0, end - W) : end + 1], end - start)[0]
    for start, end in ((0, 16), (16, 32), (32, 41))
  )
  texts = [(text(5, 5),), (text(41),)]
  model = lm(max_length=W, batch_size=2)
  short, score = model.loglikelihood_rolling(asked(*texts))
  assert score == pytest.approx(expected, abs=2e-3)
  assert short == pytest.approx(directly([0, *text(5, 5).encode()], 5)[0], abs=2e-3)


def test_a_context_split_over_devices_gives_the_same_scores():
  c, model, variables = parts()
  c = c.copy_and_resolve_references()
  c.mesh.context = 2
  mesh = sharding.make_mesh(c.mesh, 1)
  with jax.set_mesh(mesh):
    of = subject_lib.make(c, mesh, model, Letters())(variables)
    found = lm(of, batch_size=2).loglikelihood(asked(*PAIRS))
  expected = lm().loglikelihood(asked(*PAIRS))
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-3)


# ---- Generation.


def test_generation_is_greedy_and_ends_before_the_first_of_the_texts():
  before = text(12)
  ids = likeliest(Letters().encode(before), 20)
  ids = ids[: ids.index(0)] if 0 in ids else ids
  whole = Letters().decode(ids)
  early, late = whole[6], whole[3:5]
  for until, expected in (
    ([], whole),
    (early, whole.partition(early)[0]),
    ([early, late, ""], min(whole.partition(early)[0], whole.partition(late)[0], key=len)),
  ):
    for size in (1, 3):
      kwargs = dict(until=until, max_gen_toks=20)
      requests = asked((before, kwargs), (text(4), kwargs), kind="generate_until")
      assert lm(batch_size=size).generate_until(requests)[0] == expected


def test_a_prompt_leaves_room_for_what_is_generated():
  model, kwargs = lm(max_length=24), dict(max_gen_toks=8)
  requests = [(text(n), kwargs) for n in (40, 16, 17)]
  found = model.generate_until(asked(*requests, kind="generate_until", task="cut"))
  assert model.truncated == {"cut": 2}
  for (before, _), out in zip(requests, found):
    (expected,) = lm().generate_until(asked((before[-16:], kwargs), kind="generate_until"))
    assert out == expected


def test_samples_differ_by_request_and_not_by_run():
  kwargs = dict(max_gen_toks=12, do_sample=True, temperature=3.0)
  requests = asked(*[(text(6), kwargs)] * 3, kind="generate_until")
  first, again, other = (lm(seed=seed).generate_until(requests) for seed in (1, 1, 2))
  assert first == again and len({*first, *other}) == 6


@pytest.mark.parametrize(
  "kwargs, expected",
  [
    ({}, Generation((), 256, 0.0, 1.0)),
    (dict(until="x", max_new_tokens=3), Generation(("x",), 3, 0.0, 1.0)),
    (dict(until=["x", "yz"], max_gen_toks=4, max_tokens=5), Generation(("x", "yz"), 4, 0.0, 1.0)),
    (dict(do_sample=False, temperature=0.7, top_p=0.5), Generation((), 256, 0.0, 1.0)),
    (dict(temperature=0.7, top_p=0.5), Generation((), 256, 0.7, 0.5)),
  ],
)
def test_generation_kwargs_mean_what_they_mean_to_lm_eval(kwargs, expected):
  assert generation(kwargs, 1000) == expected


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(top_k=5), "generation_kwargs.top_k=5.*not supported.*top_p"),
    (dict(max_gen_toks=1000), "max_gen_toks=1000.*1 to 999"),
    (dict(max_gen_toks=0), "max_gen_toks=0"),
    (dict(do_sample=True), "temperature=0.0.*above 0"),
  ],
)
def test_generation_kwargs_that_would_be_ignored_are_errors(kwargs, message):
  with pytest.raises(ValueError, match=message):
    generation(kwargs, 1000)


def test_a_template_is_around_the_prompt_and_precedes_the_answer():
  model = lm(template="<u>{prompt}</u>")
  turns = [dict(role="system", content="Do."), dict(role="user", content="{q}")]
  assert model.apply_chat_template(turns) == "<u>Do.\n\n{q}</u>"
  turns.append(dict(role="assistant", content="So: "))
  assert model.apply_chat_template(turns, add_generation_prompt=False) == "<u>Do.\n\n{q}</u>So: "
