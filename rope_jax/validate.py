"""What is checked before anything compiles or any data is read."""

from __future__ import annotations

import os

import jax
import numpy as np
from ml_collections import ConfigDict

from rope_jax import evals, paths, resolve
from rope_jax.config import base, data_dir, train_length
from rope_jax.data import POSITIONS, posgen
from rope_jax.errors import check, choice
from rope_jax.evals.common import text_files
from rope_jax.model.config import ATTENTION, CONTEXT_PARALLEL, LINEARS, ON_CHANGE, REMAT
from rope_jax.search import settings as search
from rope_jax.sizes import check_sizes
from rope_jax.values import check_values
from rope_jax.weights import locate


def validate(c: ConfigDict, platform: str | None = None, *, inputs: bool = True) -> None:
  """Checks a run's config without compiling or reading any data.

  Args:
    c: a config.
    platform: that it will run on, 'cpu', 'gpu' or 'tpu'; that of this process if None.
    inputs: whether the weights, the tokenizer and the text must be there.

  Raises:
    ValueError: naming the key, its value and what was expected.
  """
  for name, entry in (*((f"evals.{n}", e) for n, e in c.evals.items()),
                      ("search.fitness", c.search.fitness)):  # fmt: skip
    choice(f"{name}.type", entry.get("type"), evals.EVALS)
  check_values(c)
  m, t, d = c.model, c.train, c.data
  for block, keys in (
    (c.model, "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff"),
    (c.train, "batch_size accumulation loss_chunk log_every"),
    (c.checkpoint, "every keep"),
    (c.mesh, "fsdp tensor"),
  ):
    for key in keys.split():
      check(block[key] >= 1, f"{_name(c, block)}.{key}", block[key], "at least 1")
  check(c.lora.rank >= 0, "lora.rank", c.lora.rank, "0 (none) or positive")
  check(d.length >= 0, "data.length", d.length, "0 (rope.context) or positive")
  check_sizes(c)
  choice("model.attention", m.attention, ATTENTION)
  choice("model.remat", m.remat, REMAT)
  choice("model.dtype", m.dtype, ("float32", "bfloat16"))
  choice("model.param_dtype", m.param_dtype, ("float32", "bfloat16"))
  check(m.num_heads % m.num_kv_heads == 0, "model.num_heads", m.num_heads,
         f"a multiple of model.num_kv_heads={m.num_kv_heads}")  # fmt: skip
  check(m.head_dim % 2 == 0, "model.head_dim", m.head_dim, "an even number")
  _devices(c, platform or jax.default_backend())
  choice("model.context_parallel", m.context_parallel, CONTEXT_PARALLEL)
  check(m.window >= 0, "model.window", m.window, "0 (all tokens before) or positive")
  check(not m.window or "splash" not in m.attention or m.context_parallel != "ring"
        or c.mesh.context == 1, "model.context_parallel", m.context_parallel,
        f"'all_gather' with model.window={m.window} under splash attention")  # fmt: skip
  for key in ("block_q", "block_k"):
    check(m[key] >= 0, f"model.{key}", m[key], "0 (by the shape) or positive")
    check("splash" not in m.attention or m[key] % 128 == 0, f"model.{key}", m[key],
           f"a multiple of 128 under model.attention={m.attention!r}")  # fmt: skip
  check(m.norm_eps > 0, "model.norm_eps", m.norm_eps, "positive")
  for name in m.bias:
    choice("model.bias", name, LINEARS)
  resolve.check_keys(c)
  search.validate(c)
  resolve.rope(search.placeholder(c))

  for target in c.lora.targets:
    choice("lora.targets", target, LINEARS)

  if c.lora.rank:
    check(c.lora.alpha > 0, "lora.alpha", c.lora.alpha, "positive")
    check(c.lora.targets, "lora.targets", c.lora.targets, f"some of {LINEARS}")

  check(c.seed >= 0, "seed", c.seed, "0 or more")
  choice("train.trainable", t.trainable, ("all", "adapters"))
  choice("train.schedule", t.schedule, ("constant", "cosine", "linear"))
  check(t.steps >= 0, "train.steps", t.steps, "0 or more")
  for key in ("warmup_steps", "final_learning_rate", "weight_decay", "clip", "max_skipped"):
    check(t[key] >= 0, f"train.{key}", t[key], "0 or more")
  for key in ("b1", "b2"):
    # As the step has it: a float32 that is rounded to 1 would divide by zero.
    check(t[key] >= 0 and np.float32(t[key]) < 1, f"train.{key}", t[key], "in [0, 1) as a float32")
  check(t.eps > 0, "train.eps", t.eps, "positive")
  check(t.schedule != "constant" or t.final_learning_rate == 0, "train.final_learning_rate",
        t.final_learning_rate, "0: train.schedule='constant' does not use it")  # fmt: skip
  check(t.learning_rate > 0, "train.learning_rate", t.learning_rate, "positive")
  check(t.batch_size % t.accumulation == 0, "train.batch_size", t.batch_size,
         f"a multiple of train.accumulation={t.accumulation}")  # fmt: skip
  check(t.warmup_steps < max(t.steps, 1) or not t.steps, "train.warmup_steps", t.warmup_steps,
         f"below train.steps={t.steps}")  # fmt: skip
  trains_base = t.trainable == "all" and t.steps
  check(not trains_base or m.param_dtype == "float32", "model.param_dtype", m.param_dtype,
        f"'float32' where the base is trained (train.trainable='all', train.steps={t.steps}): "
        "bfloat16 rounds updates away")  # fmt: skip
  has_adapters = c.lora.rank > 0 or c.rope.phase != "none" or c.rope.scaling == "clex"
  if t.steps:
    check(t.trainable == "all" or has_adapters, "train.trainable", t.trainable,
           "'all', since there is no adapter: lora.rank is 0 and rope.phase is 'none'")  # fmt: skip

  check(t.spike == 0 or t.spike > 1, "train.spike", t.spike, "0 (off) or above 1")
  choice("checkpoint.on_damage", c.checkpoint.on_damage, ("previous", "stop"))

  choice("data.packing", d.packing, ("pack", "document"))
  check(d.min_tokens >= 0, "data.min_tokens", d.min_tokens, "0 or more")
  check(d.length <= c.rope.context, "data.length", d.length,
         f"at most rope.context={c.rope.context}")  # fmt: skip
  _positions(c)
  choice("train.rope", t.rope, ("scaled", "unscaled"))
  if t.rope == "unscaled":
    check(c.rope.scaling != "none", "train.rope", t.rope,
          "'scaled': rope.scaling='none' scales nothing")  # fmt: skip
    check(d.positions == "sequential", "train.rope", t.rope,
          f"'scaled': data.positions={d.positions!r} says itself with which rope")  # fmt: skip
  posgen.validate(c, base().data.posgen)
  if not d.source.startswith("tfds:"):
    check(not d.text_key, "data.text_key", d.text_key, "'' unless data.source is 'tfds:NAME'")
  choice("generate.on_change", c.generate.on_change, ON_CHANGE)
  least = 128 if "splash" in m.attention else 16
  chunk = c.generate.chunk
  check(chunk >= least and chunk % least == 0, "generate.chunk", chunk,
        f"a multiple of {least} under model.attention={m.attention!r}")  # fmt: skip
  for name, entry in c.evals.items():
    check(entry.every_steps >= 0, f"evals.{name}.every_steps", entry.every_steps, "0 or more")
    evals.module(entry.type).validate(f"evals.{name}", entry, c)
  if inputs:
    _inputs(c)


def _devices(c: ConfigDict, platform: str) -> None:
  """What runs on which devices."""
  check(c.model.attention != "splash" or platform == "tpu", "model.attention", "splash",
         f"'blockwise' on {platform}: splash is a kernel for TPU")  # fmt: skip
  check(c.model.remat != "offload" or platform != "cpu", "model.remat", "offload",
         "'matmuls' on cpu, where there is no other memory to offload to")  # fmt: skip
  for axis in ("data", "context"):
    size = c.mesh[axis]
    check(size >= 1 or size == -1, f"mesh.{axis}", size, "at least 1, or -1 (what is left)")


def _positions(c: ConfigDict) -> None:
  """Positions that the method, the lengths or the packing do not go with."""
  kind, r, length, L = c.data.positions, c.rope, train_length(c), c.rope.original_context
  choice("data.positions", kind, POSITIONS)
  there = f"with data.positions={kind!r}"
  trains_clex = r.scaling == "clex" and c.train.steps > 0
  check((kind == "clex") == trains_clex, "data.positions", kind,
        "'clex' where rope.scaling='clex' is trained, and nowhere else")  # fmt: skip
  if kind in ("pose", "randomised"):
    check(length < r.context, "data.length", length, f"below rope.context={r.context} {there}")
  if kind == "pose":
    check(c.data.packing == "document", "data.packing", c.data.packing,
          f"'document' {there}, which skips text within one document")  # fmt: skip
  if kind in ("e2_llm", "clex"):
    check(length <= L, "data.length", length, f"at most rope.original_context={L} {there}")
  if kind == "e2_llm":
    check(r.scaling == "pi", "rope.scaling", r.scaling, f"'pi' {there}, which prepares for it")
    check(not r.resonance, "rope.resonance", True, f"False {there}: it trains on fractions")
  if kind == "mixed":
    check(r.scaling != "none", "rope.scaling", r.scaling, f"a method for long windows {there}")
    check(not r.longrope.start_tokens, "rope.longrope.start_tokens", r.longrope.start_tokens,
          f"0 {there}: a rope has one other rope for some of its tokens")  # fmt: skip
    check(length > L, "data.length", length,
          f"above rope.original_context={L} {there}, or no window is long")  # fmt: skip


def _inputs(c: ConfigDict) -> None:
  """Whether weights, tokenizer and text are there."""
  source = c.data.source
  there = source in ("stdlib", "posgen") or source.startswith("tfds:") or os.path.isdir(source)
  check(there or paths.files(source), "data.source", source,
         "'stdlib', 'tfds:NAME', 'posgen', or an existing folder, file or glob")  # fmt: skip
  directory = data_dir(c)
  why_not = paths.why_no_directory(directory)
  if not why_not and ("*" in directory or not paths.is_text(directory)):
    why_not = "TFDS cannot work with '*' or bytes that are no UTF-8 in it"
  check(not why_not, "data.dir", directory, f"a directory, there or to be made: {why_not}")
  for key, path in (("init_from", c.init_from), ("search.init_from", c.search.init_from)):
    if path and not path.startswith("run:"):
      try:
        locate(path)
      except ValueError as error:
        raise ValueError(f"config.{key}={path!r}: {error}") from None
  for key in ("base", "initial"):
    path = c.search[key]
    check(not path or path.startswith("run:") or os.path.exists(path), f"search.{key}", path,
          "an existing file of factors, or 'run:NAME'")  # fmt: skip
  if not c.init_from:
    check(c.tokenizer, "tokenizer", c.tokenizer, "named ('byte' or a path), with no init_from")
  if c.tokenizer not in ("", "byte", "posgen"):
    check(os.path.isfile(c.tokenizer) or os.path.isdir(c.tokenizer), "tokenizer", c.tokenizer,
          "'byte' or an existing path, of a file or a directory")  # fmt: skip
  entries = {f"evals.{name}": entry for name, entry in c.evals.items()}
  for name, entry in {**entries, "search.fitness": c.search.fitness}.items():
    for key in ("files", "haystack"):
      files = entry.get(key, "")
      if files and not files.startswith(("tfds:", "split:")):
        text_files(files, f"config.{name}.{key}")


def _name(c: ConfigDict, block: ConfigDict) -> str:
  return next(name for name in c if c[name] is block)
