"""A real pretrained Llama, SmolLM2-135M, against transformers on the same file and text."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import ROPES, THETA, ids, our_params, smollm2, text, their_logits, their_model

from rope_jax import config, resolve, rope
from rope_jax.data import tokenizer
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama, unembedding
from rope_jax.train import loop, sharding, state

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scaling", ROPES)
def test_logits_equal_transformers(scaling):
  c = smollm2(scaling)
  tokens = ids(2048)
  model = Llama(from_config(c))
  run = jax.jit(
    lambda params, r: model.apply(dict(params=params), tokens[None], r)[0] @ unembedding(params)
  )
  ours = np.asarray(run(our_params(), resolve.rope(c)))
  theirs = their_logits(their_model(ROPES[scaling]), tokens)
  assert np.abs(theirs).max() > 10
  assert np.abs(ours - theirs).max() <= 1e-3


BASE = rope.base(head_dim=64, theta=THETA, original_context=8192)
EXPORTS = dict(
  resonance_over_yarn=lambda n: rope.resonance(rope.yarn(BASE, 2.0)),
  dprope=lambda n: rope.dprope(BASE, 2.0),
  longrope2=lambda n: rope.longrope2(BASE, 2.0, seq_len=n),
  power=lambda n: rope.power(BASE),
)


@pytest.mark.parametrize("method", EXPORTS)
def test_exported_ropes_give_the_same_logits_in_unmodified_transformers(method):
  """For a short input and, by one token far off, for what transformers takes for a long one.

  Only tokens at small positions are compared: the angles of transformers are float32 products,
  off by up to 1e-3 rad at position 12,000.
  """
  tokens, make = ids(257), EXPORTS[method]
  exported = rope.to_hf(make(16_384))
  theirs = their_model(exported["rope_parameters"], exported["max_position_embeddings"])
  model = Llama(from_config(smollm2("none")))
  run = jax.jit(
    lambda params, r, p: (
      model.apply(dict(params=params), tokens[None], r, p)[0, :-1] @ unembedding(params)
    )
  )
  for last in (256, 12_000):
    positions = np.append(np.arange(256), last).astype(np.int32)
    ours = np.asarray(run(our_params(), make(last + 1), positions[None]))
    expected = their_logits(theirs, tokens, positions)[:-1]
    assert np.abs(ours - expected).max() <= 1e-3
  assert run._cache_size() == 1


@pytest.mark.long
def test_perplexity_of_16k_tokens_equals_transformers(tmp_path):
  import torch

  length = 16_384
  (tmp_path / "prose.txt").write_text(text())
  c = smollm2("yarn")
  c.evals.perplexity = config.perplexity(
    files=str(tmp_path / "prose.txt"), lengths=(length,), protocol="truncate"
  )
  ours = loop.evaluate(c, str(tmp_path / "run"))["perplexity"][str(length)]
  tokens = torch.tensor(ids(length), dtype=torch.long)
  model = their_model(ROPES["yarn"])
  with torch.no_grad():
    hidden = model.model(tokens[None]).last_hidden_state[0, :-1]
    losses = [
      torch.nn.functional.cross_entropy(
        model.lm_head(hidden[i : i + 2048]), tokens[1:][i : i + 2048], reduction="sum"
      )
      for i in range(0, length - 1, 2048)
    ]
  theirs = math.exp(sum(x.item() for x in losses) / (length - 1))
  assert ours["tokens"] == length - 1
  assert ours["ppl"] == pytest.approx(theirs, rel=2e-3)


def test_says_paris():
  c = smollm2("none")
  t = tokenizer.load("", "smollm2-135m")
  model = Llama(from_config(c))
  prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
  step = jax.jit(lambda p, x, r: model.apply(dict(params=p), x, r) @ unembedding(p))
  tokens = list(t.encode(prompt))
  start = len(tokens)
  while tokens[-1] != t.eos_id and len(tokens) < start + 12:
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(tokens)] = tokens
    tokens.append(int(step(our_params(), padded, resolve.rope(c))[0, len(tokens) - 1].argmax()))
  assert "Paris" in t.decode(tokens[start:])


@pytest.mark.long
def test_training_lora_and_psc_lowers_the_held_out_loss(tmp_path):
  c = smollm2("pi")
  c.rope.phase = "psc"
  c.lora.rank = 8
  c.data.length = 512
  c.mesh.data = 1
  c.train.update(trainable="adapters", steps=8, batch_size=1, learning_rate=5e-4, warmup_steps=1)
  c.evals.perplexity = config.perplexity(lengths=(512,), protocol="truncate", num_samples=4)
  before = loop.evaluate(c, str(tmp_path / "before"))["perplexity"]["512"]
  after = loop.train(c, str(tmp_path / "after"))["perplexity"]["512"]
  assert after["nll"] < before["nll"] - 0.1
  trained = state.run_variables(str(tmp_path / "after"), sharding.make_mesh(c.mesh, 1))
  jax.tree.map(np.testing.assert_array_equal, trained["params"], our_params())
  assert jnp.any(trained["phase"]["layers"]["attention"]["psc_q"]["up"])
