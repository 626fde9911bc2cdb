"""SmolLM2-135M, ours and that of transformers, from the same file and for the same text."""

import copy
import functools
import os
import pydoc_data.topics

import numpy as np

from rope_jax import config, presets, weights
from rope_jax.data import tokenizer
from rope_jax.train import sharding, state

# The same ropes in both: (our scaling, transformers' rope_parameters).
THETA = 100_000.0
ROPES = dict(
  none=dict(rope_type="default", rope_theta=THETA),
  pi=dict(rope_type="linear", rope_theta=THETA, factor=2.0),
  yarn=dict(rope_type="yarn", rope_theta=THETA, factor=2.0, original_max_position_embeddings=8192),
  ntk=dict(rope_type="default", rope_theta=THETA * 2 ** (64 / 62)),  # a larger base, no more
)


def text():
  """English prose that comes with Python."""
  topics = pydoc_data.topics.topics
  return "\n\n".join(topics[key] for key in sorted(topics))


@functools.cache
def ids(length):
  return tokenizer.load("", "smollm2-135m").encode(text())[:length]


def smollm2(scaling):
  c = config.base()
  presets.smollm2_135m(c)
  c.rope.scaling = scaling
  c.rope.context = 16_384
  return c


@functools.cache
def our_params():
  c = smollm2("none")
  mesh = sharding.make_mesh(c.mesh, 1)
  return state.initial_variables(c, mesh, "")["params"]


@functools.cache
def their_checkpoint():
  import torch
  from transformers import AutoModelForCausalLM

  directory, file = os.path.split(weights.locate("smollm2-135m")[1])
  return AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32).eval()


def their_model(parameters, maximum=16_384):
  """transformers' model of the checkpoint, with rope_parameters in its config."""
  from transformers import AutoModelForCausalLM

  loaded = their_checkpoint()
  hf = copy.deepcopy(loaded.config)
  hf.rope_parameters = dict(parameters)
  if parameters["rope_type"] != "default":
    hf.max_position_embeddings = maximum
  model = AutoModelForCausalLM.from_config(hf).eval()
  model.load_state_dict(loaded.state_dict())  # frequencies are made from the config, not loaded
  assert model.dtype == loaded.dtype
  return model


def their_logits(model, tokens, positions=None):
  import torch

  positions = np.arange(len(tokens)) if positions is None else positions
  tokens, positions = (torch.tensor(x, dtype=torch.long)[None] for x in (tokens, positions))
  with torch.no_grad():
    return model(tokens, position_ids=positions).logits[0].numpy()
