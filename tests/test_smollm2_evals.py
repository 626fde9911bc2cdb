"""Generation and perplexity of SmolLM2-135M against plain loops over transformers' model."""

import math

import numpy as np
import pytest
from oracle import ROPES, ids, our_params, smollm2, text, their_model

from rope_jax import config, resolve
from rope_jax.model.config import from_config
from rope_jax.model.generate import Generator
from rope_jax.model.llama import Llama
from rope_jax.train import loop


def their_greedy(model, prompt, n):
  import torch

  tokens, past, out = torch.tensor(prompt, dtype=torch.long)[None], None, []
  with torch.no_grad():
    for _ in range(n):
      result = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
      tokens, past = result.logits[:, -1].argmax(-1)[None], result.past_key_values
      out.append(tokens.item())
  return out


@pytest.mark.long
def test_greedy_generation_equals_transformers():
  """64 tokens after prompts of 16, 500 and 3,000, here in one batch, there one by one."""
  c = smollm2("yarn")
  prompts = [ids(3000)[-n:] for n in (16, 500, 3000)]
  g = Generator(
    Llama(from_config(c)),
    dict(params=our_params()),
    lambda n: resolve.rope(c, n),
    depends_on_length=False,
  )
  theirs = their_model(ROPES["yarn"])
  for ours, prompt in zip(g(prompts, 64), prompts):
    assert ours.tolist() == their_greedy(theirs, prompt, 64)


@pytest.mark.long
def test_perplexity_protocols_equal_plain_loops(tmp_path):
  """Windows of 4,096 tokens by 1,024 over 6,144 tokens."""
  import torch

  length, stride, total = 4096, 1024, 6144
  document, model = ids(total), their_model(ROPES["none"])

  def losses(start):
    window = torch.tensor(document[start : start + length], dtype=torch.long)
    with torch.no_grad():
      hidden = model.model(window[None]).last_hidden_state[0, :-1]
      parts = [model.lm_head(hidden[i : i + 1024]) for i in range(0, length, 1024)]
      loss = torch.nn.functional.cross_entropy
      pairs = zip(parts, window[1:].split(1024))
      return np.concatenate([loss(*x, reduction="none").numpy() for x in pairs]).astype(np.float64)

  windows = {start: losses(start) for start in range(0, total - length + 1, stride)}
  expected = dict(
    truncate=windows[0],
    sliding=np.concatenate([windows[0], *(windows[s][-stride:] for s in list(windows)[1:])]),
    sliding_all=np.concatenate(list(windows.values())),
  )
  (tmp_path / "prose.txt").write_text(text())
  c = smollm2("none")
  options = dict(files=str(tmp_path / "prose.txt"), lengths=(length,), stride=stride)
  for protocol in expected:
    tokens = 0 if protocol == "truncate" else total
    c.evals[protocol] = config.perplexity(protocol=protocol, document_tokens=tokens, **options)
  found = loop.evaluate(c, str(tmp_path / "run"))
  for protocol, nll in expected.items():
    ours = found[protocol][str(length)]
    assert ours["tokens"] == len(nll)
    assert ours["ppl"] == pytest.approx(math.exp(nll.mean()), rel=1e-3)
