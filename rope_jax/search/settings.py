"""`config.search`: what is searched, on what, from where; and the run with what was found."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os

import numpy as np
from ml_collections import ConfigDict

from rope_jax import config as config_lib
from rope_jax import evals, factors, resolve
from rope_jax import rope as rope_lib
from rope_jax.errors import check, choice
from rope_jax.evals.entries import complete
from rope_jax.rope import Rope
from rope_jax.search import METHODS
from rope_jax.search.candidate import Candidate, Space, candidate, ordered
from rope_jax.weights import locate

FACTORS, JOURNAL = "factors.json", "search.jsonl"


@dataclasses.dataclass(frozen=True)
class Stage:
  """One extension, or recovery: the rope before it, and what its factors mean after it.

  Attributes:
    rope: whose frequencies the searched factors divide, [pairs].
    factor: s, by which this stage extends; the reduced one of a recovery.
    length: tokens of the sequences that are evaluated.
    initial: candidates of the user's.
    base: rope of the base model.
    before: factors of the stage before, which the searched ones multiply; ones if there is none.
    long: long factors that a recovery leaves as they are, and their start_tokens; or None.
  """

  config: ConfigDict
  rope: Rope
  factor: float
  length: int
  initial: tuple[Candidate, ...]
  base: Rope
  before: Candidate
  long: Candidate | None

  def lists(self, found: Candidate) -> dict:
    """The factors as `config.rope.longrope.factors` reads them."""
    own = [float(x) for x in np.multiply(self.before.factors, found.factors)]
    if self.long is None:
      return dict(long_factor=own, start_tokens=found.start_tokens)
    return dict(
      long_factor=list(self.long.factors), short_factor=own, start_tokens=self.long.start_tokens
    )

  def rope_of(self, found: Candidate | None, seq_len: int | None = None) -> Rope:
    """The rope of a candidate (None: of any one), the same as that of a config with its factors."""
    c = self.config.rope
    found = candidate(np.ones(self.rope.rotary_dim // 2)) if found is None else found
    lists = self.lists(found)
    start = lists.pop("start_tokens")
    out = rope_lib.longrope(
      self.base,
      resolve.factor(self.config),
      seq_len=self.length if seq_len is None else seq_len,
      attention=c.longrope.attention,
      start_tokens=start,
      **lists,
    )
    out = rope_lib.resonance(out) if c.resonance else out
    if self.searches_start and out.short is None:
      # Of the same structure as a rope with start tokens, so that both run the same program.
      out = dataclasses.replace(out, short=self.base, start_tokens=0)
    return dataclasses.replace(out, context=c.context)

  @property
  def searches_start(self) -> bool:
    """Whether candidates may have start tokens."""
    block = self.config.search[self.config.search.method]
    return any(block.get("start_tokens", ()))


def validate(c: ConfigDict) -> None:
  """Checks config.search without reading text or weights.

  Raises:
    ValueError: naming the key.
  """
  s, default = c.search, config_lib.base().search
  if not s.method:
    for key, value in default.items():
      check(s[key] == value, f"search.{key}", _plain(s[key]),
            f"left at {_plain(value)!r}, since search.method='' searches nothing")  # fmt: skip
    return
  choice("search.method", s.method, METHODS)
  choice("search.factors", s.factors, ("long", "short"))
  for name in METHODS:
    if name != s.method:
      for key, value in default[name].items():
        check(s[name][key] == value, f"search.{name}.{key}", s[name][key],
              f"left at {value!r}, since search.method={s.method!r} does not use it")  # fmt: skip
  check(c.rope.scaling == "longrope", "rope.scaling", c.rope.scaling,
        f"'longrope', whose factors search.method={s.method!r} is for")  # fmt: skip
  check(s.batch_size >= 0, "search.batch_size", s.batch_size, "0 (by memory) or positive")
  check(c.train.rope == "scaled", "train.rope", c.train.rope, "'scaled' where factors are searched")
  block = c.rope.longrope
  if s.factors == "long":
    for key in ("factors", "long_factor", "short_factor", "start_tokens"):
      check(not block[key], f"rope.longrope.{key}", block[key],
            "empty where search.factors='long': that is what is searched")  # fmt: skip
  else:
    check(not block.short_factor, "rope.longrope.short_factor", block.short_factor,
          "() where search.factors='short': that is what is searched")  # fmt: skip
    for key in ("factors", "long_factor", "start_tokens"):
      check(not (s.base and block[key]), f"rope.longrope.{key}", block[key],
            "empty where search.base names the long factors")  # fmt: skip
    check(s.base or block.factors or block.long_factor, "search.factors", s.factors,
          "'long', or long factors in search.base or rope.longrope")  # fmt: skip
    check("longrope2" not in s.method, "search.method", s.method,
          "another where search.factors='short': factors of longrope2 are at least s")  # fmt: skip
    start = s.longrope.start_tokens
    check(s.method != "longrope" or not any(start), "search.longrope.start_tokens", start,
          "(0,) where search.factors='short'")  # fmt: skip
  check(s.factor == 0 or s.factor > 1, "search.factor", s.factor, "0 (by the contexts) or above 1")
  check(not (s.method == "gradient" and c.rope.resonance), "rope.resonance", True,
        "False under search.method='gradient': rounding has no derivative")  # fmt: skip
  check(not (s.init_from and c.rope.base == "checkpoint"), "search.init_from", s.init_from,
        "'' where rope.base='checkpoint', whose rope is that of init_from")  # fmt: skip
  check(c.data.positions != "mixed" or not any(s[s.method].get("start_tokens", ())),
        f"search.{s.method}.start_tokens", s[s.method].get("start_tokens"),
        "(0,) with data.positions='mixed'")  # fmt: skip
  if c.rope.base == "plain" and not s.base and s.factors == "long":
    # What needs no file; the rest is checked when the files are read.
    factor = s.factor or c.rope.context / c.rope.original_context
    check(factor > 1, "rope.context", c.rope.context, "above rope.original_context")
    method(c).check(Space(resolve.base(c), factor, (), c.seed))
  entry = fitness_entry(c)
  files = entry.get("files", "")
  check(not files.startswith("split:") or files[6:] in ("train", "validation", "test"),
        "search.fitness.files", files, "'split:train' or 'split:validation'")  # fmt: skip
  evals.module(entry.type).validate("search.fitness", entry, c)
  tokens = hasattr(evals.module(entry.type), "rows")
  check(tokens or s.method != "gradient", "search.fitness.type", entry.type,
        "'perplexity' or 'needle' under search.method='gradient'")  # fmt: skip
  check(tokens or s.batch_size <= 1, "search.batch_size", s.batch_size,
        f"0 or 1: search.fitness.type={entry.type!r} has one candidate at a time")  # fmt: skip


def method(c: ConfigDict):
  """The method of a config with its options."""
  return METHODS[c.search.method](**c.search[c.search.method].to_dict())


def fitness_entry(c: ConfigDict) -> ConfigDict:
  """The evaluation that says how good a candidate is, complete and at its one length."""
  holder = ConfigDict(dict(fitness=c.search.fitness.copy_and_resolve_references()))
  try:
    complete(holder)
  except ValueError as error:
    raise ValueError(str(error).replace("config.evals.", "config.search.")) from error
  entry, L = holder.fitness, c.rope.original_context
  check("lengths" in entry, "search.fitness.type", entry.type, "a type that has lengths")
  key, n = "search.fitness.lengths", tuple(entry.lengths)
  check(len(n) <= 1, key, n, "one length, or () for the whole window")
  long = c.search.factors == "long"
  entry.lengths = n or ((c.rope.context,) if long else (L,))
  check(entry.every_steps == 0, "search.fitness.every_steps", entry.every_steps, "0")
  if long:
    check(entry.lengths[0] > L, key, entry.lengths,
          f"above rope.original_context={L}: up to that the short factors hold")  # fmt: skip
  else:
    check(entry.lengths[0] <= L, key, entry.lengths,
          f"at most rope.original_context={L}, as far as the short factors hold")  # fmt: skip
  return entry


def stage(c: ConfigDict, workdir: str) -> Stage:
  """What is searched: reads the factors that the config names.

  Raises:
    ValueError: if they are not there, or of another rope.
  """
  s, base, L = c.search, resolve.base(c), c.rope.original_context
  ones = candidate(np.ones(base.rotary_dim // 2))
  before, rope, context, long, initial = ones, base, L, None, ()
  if s.base and s.factors == "long":
    before, made = _given(c, "search.base", s.base, workdir)
    context = made.get("context", 0)
    check(L < context < c.rope.context, "search.base", s.base,
          f"factors for a context between {L} and rope.context={c.rope.context}, and saying "
          "so")  # fmt: skip
    check(not before.start_tokens, "search.base", s.base, "factors without start_tokens")
    at = dataclasses.replace(base, inv_freq=base.inv_freq / np.array(before.factors), period=None)
    rope = rope_lib.rebase(at, context)
  factor = c.rope.context / context
  if s.factors == "short":
    long = _given(c, "search.base", s.base, workdir)[0] if s.base else _long(c)
    factor = s.factor or math.sqrt(factor)
    # What lies between no interpolation and that of the long factors.
    ratio = (factor - 1) / (c.rope.context / L - 1)
    towards = np.clip(1 + (ordered(long.factors) - 1) * ratio, 1, 1.25 * factor)
    initial = (candidate(towards, name="long, reduced"), candidate(ones.factors, name="none"))
  if s.initial:
    given, _ = _given(c, "search.initial", s.initial, workdir)
    own = ordered(np.divide(given.factors, before.factors))
    initial = (candidate(own, given.start_tokens, name="initial"), *initial)
  (length,) = fitness_entry(c).lengths
  return Stage(c, rope, s.factor or factor, length, initial, base, before, long)


def placeholder(c: ConfigDict) -> ConfigDict:
  """The config with factors that say nothing, where its own are still to be found."""
  s = c.search
  if not s.method or s.factors == "short" and not s.base:
    return c
  pairs = int(c.model.head_dim * c.rope.partial_rotary_factor) // 2
  c = c.copy_and_resolve_references()
  c.rope.longrope.long_factor = (max(c.rope.context / c.rope.original_context, 1.0),) * pairs
  return c


def searched(c: ConfigDict, workdir: str) -> ConfigDict:
  """The config of a run with the factors that its search has found, and nothing left to search.

  Raises:
    ValueError: if there are none in its workdir.
  """
  if not c.search.method:
    return c
  path = os.path.abspath(os.path.join(workdir, FACTORS))
  check(os.path.exists(path), "search.method", c.search.method,
        f"'', or {FACTORS} in {workdir}, which launch/search.py writes")  # fmt: skip
  c = c.copy_and_resolve_references()
  c.rope.longrope.update(factors=path, long_factor=(), short_factor=(), start_tokens=0)
  c.search = config_lib.base().search
  return c


def model_config(c: ConfigDict) -> ConfigDict:
  """The config of the model that candidates are evaluated on."""
  c = placeholder(c).copy_and_resolve_references()
  c.init_from = c.search.init_from or c.init_from
  return c


def made_for(c: ConfigDict) -> dict:
  """What a file of factors says of the rope that they are for."""
  return dict(resolve.factors_made_for(c), context=c.rope.context)


def newest_step(path: str) -> int | None:
  """The newest checkpoint of a run, None where weights are of something else."""
  if not os.path.isdir(path) or locate(path)[0] != "run":
    return None
  from rope_jax.train.checkpoint import Checkpoints

  checkpoints = Checkpoints(path)
  try:
    return checkpoints.latest()
  finally:
    checkpoints.close()


def digest(value) -> str:
  """Of candidates, or of other data, for comparison."""
  return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _given(c: ConfigDict, key: str, path: str, workdir: str) -> tuple[Candidate, dict]:
  """The long factors of a file, 'run:NAME' being the run of this name beside this one."""
  if path.startswith("run:"):
    path = os.path.join(os.path.dirname(os.path.abspath(workdir)), path[4:], FACTORS)
  try:
    found = factors.read(path)
    factors.check(found, resolve.factors_made_for(c), free=("factor",))
  except ValueError as error:
    raise ValueError(f"config.{key}={path!r}: {error}") from None
  pairs = int(c.model.head_dim * c.rope.partial_rotary_factor) // 2
  own = np.asarray(found["long_factor"], np.float64)
  check(own.shape == (pairs,), key, path,
        f"a factor for each of the {pairs} pairs, of which it has {own.shape}")  # fmt: skip
  return candidate(own, found.get("start_tokens", 0)), found.get("made_for", {})


def _long(c: ConfigDict) -> Candidate:
  """The long factors of config.rope.longrope, which must be there."""
  rope = resolve.rope(c, c.rope.context)
  options = dict(rope.history)["longrope"]
  own = np.asarray(options["long_factor"])
  check(
    own.ndim == 1, "rope.longrope.long_factor", own.shape, "one row where search.factors='short'"
  )
  return candidate(own, options.get("start_tokens", 0), name="long")


def _plain(value):
  return value.to_dict() if isinstance(value, ConfigDict) else value
