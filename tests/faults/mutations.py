"""Random changes of configs, of the kinds that a command line or a config file can make."""

from ml_collections import ConfigDict

from rope_jax import resolve, rope
from rope_jax.data import POSITIONS, posgen
from rope_jax.evals import EVALS
from rope_jax.evals.ruler_tasks import TASKS
from rope_jax.model.config import ATTENTION, CONTEXT_PARALLEL, LINEARS, ON_CHANGE, REMAT
from rope_jax.search import METHODS

INTS = (
  -1,
  0,
  1,
  2,
  3,
  7,
  97,
  128,
  1009,
  2**20,
  2**31 - 1,
  2**31,
  2**63,
  10**30,
  -(2**31),
  -(2**63),
)
INTS += (-7, -(10**30), 2**30, 2**24 + 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1.0, 5e-324, 1e-300, 1e-46)
FLOATS += (1e-9, 0.5, 2.0, 1e38, 1e39, 1e300, -1e300, 3.7, 1e5)
TEXTS = ("", " ", "no such", "a\nb", "a\0b", "\udc80", "żółć", "../..", "~", "/", "//", "None", "0")
TEXTS += ("run:", "run:a", "tfds:", "tfds:a/b", "split:", "split:train", "*", "[", "**", "x" * 5000)
TEXTS += ("{prompt}", "{}", "{prompt", "{0}", "{prompt!x}", "stdlib", "[" * 500, "nan", "{", "a,b")
TUPLES = ((), (0,), (-1,), (2**63,), ("q", 1), ("q", "q"), ((),), ((1,), (2, 3)), (float("nan"),))
TUPLES += (
  (1.5,),
  (None,),
  (True,),
  ({},),
  ("",),
  (b"q",),
  (1,) * 2000,
  ("a\0",),
  (10**400,),
  ([1],),
)
TUPLES += ((64, 64), ((64,),), (32,), (1.0,) * 8, ((1.0,) * 8,) * 2, ("q", "up"), ((("q",),),))
OTHERS = (None, True, 1.5, "1", b"x")  # of other types than the leaf; a config file can try

# What is valid for keys by their last name.
CHOICES = dict(
  scaling=tuple(rope.SCALINGS),
  phase=resolve.PHASES,
  base=("plain", "checkpoint", ""),
  attention=(*ATTENTION, "su", "yarn", "1.2"),
  context_parallel=CONTEXT_PARALLEL,
  remat=REMAT,
  dtype=("float32", "bfloat16"),
  param_dtype=("float32", "bfloat16"),
  trainable=("all", "adapters"),
  schedule=("constant", "cosine", "linear"),
  rope=("scaled", "unscaled"),
  packing=("pack", "document"),
  positions=tuple(POSITIONS),
  task=tuple(posgen.TASKS),
  mode=tuple(posgen.MODES),
  method=("", *METHODS),
  on_change=ON_CHANGE,
  share=("none", "heads", "layers", "all"),
  init=("released", "fan_in"),
  calibration=("pre", "post"),
  ramp=("dim", "rotation"),
  direction=("forward", "reverse"),
  reduction=("sum", "mean"),
  dropped=("zero", "one"),
  activation=("tanh", "silu"),
  type=tuple(EVALS),
  protocol=("sliding", "sliding_all", "truncate"),
  rule=("yarn", "pose"),
  placement=("start", "spread"),
  split=("test", "val"),
  targets=LINEARS,
  bias=LINEARS,
  tasks=tuple(TASKS),
  candidates=("pi", "ntk", "yarn", "llama3"),
  factors=("long", "short", ""),
  tokenizer=("byte", "posgen", ""),
  source=("stdlib", "posgen"),
  files=("", "split:train", "split:validation"),
  metadata=("", "{}", "[]", '{"a": 1}'),
)


def leaves(c: ConfigDict, prefix: str = ""):
  """(key, its block) of every value of a config."""
  for key in c:
    if isinstance(c[key], ConfigDict):
      yield from leaves(c[key], f"{prefix}{key}.")
    else:
      yield prefix + key, c


def mutate(rng, c: ConfigDict) -> dict:
  """Changes 1 to 4 leaves of a config, half of the time near to what is valid; {key: new value}."""
  keys, changes = dict(leaves(c)), {}
  near, wanted = rng.random() < 0.5, rng.integers(1, 5)
  names = list(keys)
  if rng.random() < 0.8:  # most options are of methods that are not chosen
    names = [name for name in names if is_read(c, name)]
  # A leaf of a block of few is as likely as one of many.
  blocks = sorted({name.rpartition(".")[0].partition(".")[0] for name in names})
  for _ in range(100):
    block = blocks[rng.integers(len(blocks))]
    own = [name for name in names if name.rpartition(".")[0].partition(".")[0] == block]
    key = own[rng.integers(len(own))]
    holder, last = keys[key], key.rpartition(".")[2]
    kind, old = holder.get_type(last), holder[last]
    value = near_value(rng, last, kind, old) if near else wild_value(rng, kind)
    try:
      holder[last] = value
    except (TypeError, OverflowError):  # ml_collections refuses it itself
      continue
    changes[key] = holder[last]
    if len(changes) == wanted:
      break
  return changes


def is_read(c: ConfigDict, key: str) -> bool:
  """Whether a setting is one of what the config has chosen."""
  block, _, name = key.partition(".")
  choice, option = name.partition(".")[::2]
  if block == "rope" and option:
    return choice in (c.rope.scaling, c.rope.phase)
  if block == "search":
    return bool(c.search.method) and (not option or choice in (c.search.method, "fitness"))
  return choice != "posgen" or c.data.source == "posgen"


def near_value(rng, name: str, kind: type, old):
  """A value that may well be valid, of the kind of the old one."""
  if kind is bool:
    return bool(rng.random() < 0.5)
  if kind is int:
    return pick(rng, (old, 2 * old, old // 2, old + 1, 1, 2, 8, 16, 64, 0))
  if kind is float:
    return pick(rng, (old, 1.0, 0.5, 2.0 if old is None else 2 * old, 4.0, 0.01))
  if kind is tuple:
    known = CHOICES.get(name, old or (1, 64))
    return tuple(known[i] for i in rng.permutation(len(known))[: rng.integers(1, 4)])
  return pick(rng, CHOICES.get(name, (old, "")))


def wild_value(rng, kind: type):
  """Anything of a type, or now and then of another."""
  if rng.random() < 0.1:
    return pick(rng, OTHERS)
  if kind is bool:
    return bool(rng.random() < 0.5)
  return pick(rng, {int: INTS, float: FLOATS, tuple: TUPLES}.get(kind, TEXTS))


def pick(rng, values):
  return values[rng.integers(len(values))]
