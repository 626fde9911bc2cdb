"""Variables of a run: born sharded, read from a checkpoint, or both."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from rope_jax import config as config_lib
from rope_jax import resolve
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train.checkpoint import Checkpoints
from rope_jax.train.sharding import shardings
from rope_jax.weights import load, locate


def initial_variables(c, mesh, workdir: str) -> dict:
  """Variables before the first step, by collection.

  The base model comes from config.init_from, or from config.seed; adapters start as the identity,
  except that those of a run named by init_from are taken over.

  Raises:
    ValueError: if the checkpoint does not match the config.
  """
  placed, given = abstract_variables(c, mesh), {}
  check_init(c, workdir)
  if c.init_from:
    path = init_path(c, workdir)
    if locate(path)[0] == "run":
      given = run_variables(path, mesh)
    else:
      given["params"] = load.load_params(path, placed["params"])
      if "phase" in placed and (phase := load.load_phase(path, placed["phase"])):
        given["phase"] = phase
  for name in given:
    if name not in placed:
      raise ValueError(
        f"config.init_from={c.init_from!r}: the run has parameters {name!r} that this config has "
        "no place for"
      )
    _check_same(c, placed[name], given[name])
  wanted = {name: placed[name] for name in placed if name not in given}

  def missing():
    variables = init(c)
    return {name: variables[name] for name in wanted}

  # Only these are computed: the rest of the initialisation is dead code to the compiler.
  made = jax.jit(missing, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))()
  return {name: given.get(name, made.get(name)) for name in placed}


def abstract_variables(c, mesh) -> dict:
  """Shapes, dtypes and shardings of all variables, by collection; nothing is computed."""
  return placed(mesh, jax.eval_shape(lambda: init(c)))


def placed(mesh, tree):
  """A tree of shapes and dtypes, with the sharding of each leaf by the rules of `sharding`."""
  return jax.tree.map(_with_sharding, tree, shardings(mesh, tree))


def init(c) -> dict:
  """Variables of config.seed, on one device or as shapes under `jax.eval_shape`."""
  tokens = jnp.zeros((1, 8), jnp.int32)
  return dict(Llama(from_config(c)).init(jax.random.key(c.seed), tokens, resolve.rope(c), tokens))


def check_init(c, workdir: str) -> None:
  """Compares a config with what config.init_from says of itself, without reading any weights.

  Raises:
    ValueError: naming the key that differs.
  """
  if not c.init_from:
    return
  path = init_path(c, workdir)
  if locate(path)[0] != "run":
    load.check(c)
    return
  check_source(c, config_lib.read(path))


def check_source(c, source) -> None:
  """Compares a config with that of the run it starts from.

  What shapes do not tell: settings under which the weights of that run have a meaning.

  Raises:
    ValueError: naming the key that differs.
  """
  keys = ["rope.partial_rotary_factor", "model.norm_eps"]
  keys += ["rope.theta"] if c.rope.base == "plain" else []
  scaled = source.rope.scaling != "none" and source.train.rope == "scaled"
  scaled = scaled or source.rope.base != "plain"
  if (scaled or source.rope.resonance) and c.rope.base == "plain":
    # It was trained with that rope: another method would start from the plain base again.
    keys += ["rope.base", "rope.resonance", "rope.original_context"]
    keys += ["rope.scaling"] if scaled else []  # Resonance comes over any method, also a later one
  if source.lora.rank or source.rope.phase != "none":
    keys += ["lora.rank", "lora.alpha", "rope.phase"]
  learned = [
    n for n in (source.rope.phase, source.rope.scaling) if n in ("clex", *resolve.PHASES[1:])
  ]
  keys += [f"rope.{n}.{key}" for n in learned for key in source.rope[n] if key != "init"]
  for key in keys:
    ours, theirs = c, source
    for part in key.split("."):
      ours, theirs = ours[part], theirs[part]
    if ours != theirs:
      raise ValueError(f"config.{key}={ours!r}: the run {c.init_from!r} has {theirs!r}")


def run_variables(workdir: str, mesh, step: int | None = None) -> dict:
  """All variables of a run: its base model, with what its newest checkpoint has trained.

  Raises:
    ValueError: if there is no checkpoint, or it is damaged.
  """
  c = config_lib.read(workdir)
  variables = initial_variables(c, mesh, workdir)
  if not c.train.steps:
    return variables
  checkpoints = Checkpoints(workdir)
  step = checkpoints.latest() if step is None else step
  if step is None:
    raise ValueError(f"--workdir={workdir}: the run has no checkpoint yet")
  if step not in checkpoints.steps():
    kept = ", ".join(map(str, checkpoints.steps()))
    raise ValueError(f"--step={step}: {workdir} has checkpoints after steps {kept}")
  trainable, frozen = split(c, variables)
  restored = checkpoints.restore(step, trainable=abstract_of(trainable))
  checkpoints.close()
  return {**frozen, **restored["trainable"]}


def split(c, variables: dict) -> tuple[dict, dict]:
  """(trainable, frozen) collections, by config.train.trainable."""
  frozen = {k: v for k, v in variables.items() if c.train.trainable == "adapters" and k == "params"}
  return {k: v for k, v in variables.items() if k not in frozen}, frozen


def init_path(c, workdir: str) -> str:
  """config.init_from, 'run:NAME' being a run beside this one."""
  if c.init_from.startswith("run:"):
    return os.path.join(os.path.dirname(os.path.abspath(workdir)), c.init_from[len("run:") :])
  return c.init_from


def abstract_of(tree):
  """Shapes, dtypes and shardings of a tree of arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _with_sharding(leaf, sharding):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same(c, expected, given) -> None:
  ours, theirs = (
    {jax.tree_util.keystr(k): (v.shape, v.dtype) for k, v in jax.tree_util.tree_leaves_with_path(t)}
    for t in (expected, given)
  )
  for key in sorted(set(ours) | set(theirs)):
    if ours.get(key) != theirs.get(key):
      raise ValueError(
        f"config.init_from={c.init_from!r}: {key} is {theirs.get(key)} there and "
        f"{ours.get(key)} by this config"
      )
