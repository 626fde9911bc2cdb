"""Checkpoints as sources of tensors, under Hugging Face's names and layout.

A source has `hyperparameters` (keys of config.model), `rope`, the rope that the model was made
with, `names()`, `unread` (stored tensors that it does not understand), `shape(name)`, and
`read(name, box)`, which gives [out, in] matrices for the half-split rotary layout, or a box of one.
"""

from __future__ import annotations

from rope_jax import reading
from rope_jax.weights import locate
from rope_jax.weights.huggingface import HuggingFaceSource


def open_source(init_from: str):
  """Opens a Hugging Face directory, a GGUF file or a packaged checkpoint; see `locate`.

  Raises:
    ValueError: if it is no model that can be read, naming it and saying why.
  """
  path = init_from
  try:
    kind, path = locate(init_from)
    if kind == "hf":
      return HuggingFaceSource(path)
    if kind == "run":
      raise ValueError(f"{path} is the workdir of a run, not a checkpoint")
    from rope_jax.weights.gguf_file import GGUFSource  # the package is slow to import

    return GGUFSource(path)
  except ValueError as error:  # what a file says may be quoted in it, at any length
    raise reading.refusal(path, error) from error
