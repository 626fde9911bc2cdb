"""Where the weights of a run come from in the end, through the runs that it starts from."""

from __future__ import annotations

import dataclasses
import os

from rope_jax import config as config_lib
from rope_jax import reading
from rope_jax.train import state
from rope_jax.weights import huggingface, locate


@dataclasses.dataclass(frozen=True)
class Origin:
  """The checkpoint at the beginning.

  Attributes:
    path: its file or directory; '' if the weights were random.
    name: what to call it; '' if the weights were random.
    hf: its config.json, and
    generation: its generation_config.json, where it is a Hugging Face directory; else {}.
    retrained: the first run on the way that trained the base model itself; '' if none did.
  """

  path: str = ""
  name: str = ""
  hf: dict = dataclasses.field(default_factory=dict)
  generation: dict = dataclasses.field(default_factory=dict)
  retrained: str = ""


def of(c, workdir: str) -> Origin:
  """The origin of a run.

  Raises:
    ValueError: if a file of it cannot be read.
  """
  if not c.init_from:
    return Origin()
  kind, path = locate(state.init_path(c, workdir))
  if kind == "run":
    source = config_lib.read(path)
    found = of(source, path)
    if source.train.steps and source.train.trainable == "all" and not found.retrained:
      found = dataclasses.replace(found, retrained=c.init_from)
    return found
  name = c.init_from if not os.path.exists(path) else os.path.basename(os.path.abspath(path))
  if kind != "hf":
    return Origin(path=path, name=os.path.splitext(name)[0] if kind == "gguf" else name)
  hf, generation = (
    reading.read_object(huggingface.inside(path, file))
    if os.path.isfile(os.path.join(path, file))
    else {}
    for file in ("config.json", "generation_config.json")
  )
  return Origin(path=path, name=name, hf=hf, generation=generation)
