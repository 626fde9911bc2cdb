"""An export in transformers against ours on the same text: is it the same model?

Ours has the weights of the export and the resolved rope of its provenance, which is that of the
run, not what config.json makes of it. torch and transformers are asked for here only.
"""

from __future__ import annotations

import dataclasses
import math
import os
from importlib import resources

import jax
import numpy as np
from tqdm import tqdm

from rope_jax import presets, reading
from rope_jax import rope as rope_lib
from rope_jax.data import tokenizer
from rope_jax.data.text_builder import read_text
from rope_jax.export import PROVENANCE
from rope_jax.export.hf_config import MODELLING, auto_map
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train import sharding, state
from rope_jax.train.step import token_loss
from rope_jax.weights import families

CHUNK = 256  # tokens whose logits exist at a time


def verify(path: str, tokens: int, text: str = "", start: int = 0) -> dict:
  """Perplexity of the first tokens of a text, by both.

  Args:
    path: directory of an export of a whole model, with its tokenizer.
    tokens: how many.
    text: a file; '' is the prose of Python's manual.
    start: characters of the text to skip.

  Returns:
    {'tokens', 'ours', 'theirs' (perplexities), 'difference' (the largest of a token's loss, nats)}.

  Raises:
    ValueError: if it is no export, the text is too short, or torch is not installed.
  """
  try:
    import torch
    from transformers import AutoModelForCausalLM
  except ImportError as error:
    raise ValueError(f"verify needs PyTorch and transformers ({error.name} is missing)") from None
  facts, trusted = _facts(path), _has_our_code(path)
  r, original = facts["rope"], facts["rope"]["original_context"]
  if "seq_len" in r and tokens != r["context"]:
    fixed = all("long_factor" in options for _, options in r["history"])
    if not fixed or tokens <= original:
      raise ValueError(
        f"--tokens={tokens}: the rope depends on the length, and what is known of it is for "
        + (f"more than {original:,} tokens" if fixed else f"{r['context']:,} tokens")
      )
  c = presets.pretrained(path)
  c.model.dtype = c.model.param_dtype = "float32"
  ids = tokenizer.load("", path).encode(read_text(text or presets.manual())[start:])[:tokens]
  if len(ids) < tokens:
    raise ValueError(f"--text={text}: it has {len(ids):,} tokens, fewer than {tokens:,}")
  ours = _our_losses(c, _rope(facts), ids)

  model = AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, trust_remote_code=trusted
  ).eval()
  with torch.no_grad():
    batch = torch.tensor(ids, dtype=torch.long)[None]
    hidden = model.get_decoder()(batch, use_cache=False).last_hidden_state[0]
    parts = []
    for i in tqdm(range(0, tokens - 1, CHUNK), desc="transformers", disable=None, leave=False):
      logits = model.get_output_embeddings()(hidden[i : min(i + CHUNK, tokens - 1)])
      targets = batch[0, i + 1 : i + 1 + len(logits)]
      parts.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy())
  theirs = np.concatenate(parts)
  return dict(
    tokens=tokens,
    ours=math.exp(ours.mean()),
    theirs=math.exp(theirs.mean()),
    difference=float(np.abs(ours - theirs).max()),
  )


def _facts(path: str) -> dict:
  file = os.path.join(path, PROVENANCE)
  if not os.path.exists(file) or not os.path.exists(os.path.join(path, "config.json")):
    raise ValueError(f"{path}: no export of a whole model ({PROVENANCE} and config.json)")
  return reading.read_object(file)


def _rope(facts: dict):
  r = facts["rope"]
  base = rope_lib.base(
    head_dim=r["head_dim"],
    theta=r["theta"],
    original_context=r["original_context"],
    partial_rotary_factor=facts["config"]["rope"]["partial_rotary_factor"],
  )
  return dataclasses.replace(
    base, inv_freq=np.array(r["inv_freq"]), attention_scale=r["attention_scale"]
  )


def _our_losses(c, rope, ids) -> np.ndarray:
  mesh = sharding.make_mesh(c.mesh, 1, must_divide=False)
  with jax.set_mesh(mesh):
    variables = state.initial_variables(c, mesh, "")
    loss = token_loss(Llama(from_config(c)), chunk=CHUNK)
    losses = loss(variables, ids[None].astype(np.int32), rope)
  return np.asarray(losses[0], np.float64)


def _has_our_code(path: str) -> bool:
  """Whether the export comes with code, which must be the modelling file of this package alone."""
  hf = reading.read_object(os.path.join(path, "config.json"))
  wanted = hf.get("auto_map")
  if not wanted and not os.path.exists(os.path.join(path, MODELLING)):
    return False
  own = (resources.files("rope_jax.export") / MODELLING).read_bytes()
  if not os.path.isfile(os.path.join(path, MODELLING)):
    raise ValueError(f"{path} has code that is not of this version of rope_jax; it is not run")
  ours = [auto_map(name.removesuffix("ForCausalLM")) for name in families.CLASSES.values()]
  with open(os.path.join(path, MODELLING), "rb") as f:
    if f.read(len(own) + 1) != own or wanted not in ours:
      raise ValueError(f"{path} has code that is not of this version of rope_jax; it is not run")
  return True
