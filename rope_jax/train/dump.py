"""A step that a run stopped at, kept whole: what it started from and its batch; and run again."""

from __future__ import annotations

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax import config as config_lib
from rope_jax import resolve
from rope_jax.config import write_json
from rope_jax.errors import DiskError
from rope_jax.model import attention
from rope_jax.model.config import from_config
from rope_jax.model.llama import Llama
from rope_jax.train import multihost, sharding, state
from rope_jax.train import step as step_lib
from rope_jax.train.checkpoint import Checkpoints
from rope_jax.train.guard import guarded
from rope_jax.train.optimizer import optimizer

DIRECTORY = "nonfinite"  # in the workdir: a directory for each step


def write(workdir: str, step: int, batch: dict, time: int, values: dict, **items) -> str:
  """Keeps a step; all processes must.

  Args:
    workdir: of the run.
    step: its number, from 1.
    batch: of all sequences, numpy.
    time: CLEX's t of the step.
    values: its metrics.
    **items: trainable and opt_state before the step.

  Raises:
    DiskError: if it cannot be written.

  Returns:
    The directory: step.json, batch.npz, and checkpoints/ with the items.
  """
  path = os.path.join(workdir, DIRECTORY, str(step))
  failed: OSError | None = None
  if multihost.is_main():
    try:
      shutil.rmtree(path, ignore_errors=True)
      os.makedirs(path)
      np.savez(os.path.join(path, "batch.npz"), **batch)
    except OSError as error:
      failed = error
  if multihost.any_of(failed is not None):  # all processes give up, or none
    raise DiskError(f"{path}: {failed or 'the main process could not write it'}")
  checkpoints = Checkpoints(path, keep=1)
  checkpoints.save(step, **items)
  checkpoints.close()
  if multihost.is_main():
    facts = {k: v if np.isfinite(v) else str(v) for k, v in values.items()}
    write_json(os.path.join(path, "step.json"), dict(step=step, time=time, **facts))
  return path


def replay(path: str) -> dict:
  """Runs a kept step again and looks for what is not finite.

  Args:
    path: from `write`, in the workdir of its run.

  Returns:
    step; loss and grad_norm, as the run had them; losses: [(row, place)] of the first tokens whose
    loss is not finite, and how many there are; parameters, gradients: {name: entries that are not
    finite} of all variables and of those that are trained.

  Raises:
    ValueError: if it is not such a directory.
  """
  try:
    with open(os.path.join(path, "step.json")) as f:
      facts = json.load(f)
    with np.load(os.path.join(path, "batch.npz"), allow_pickle=False) as f:
      batch = dict(f)
  except (OSError, ValueError) as error:
    raise ValueError(f"--step={path}: not a step that a run has kept: {error}") from error
  workdir = os.path.dirname(os.path.dirname(os.path.abspath(path)))
  try:
    c, step = config_lib.read(workdir), facts["step"]
  except ValueError as error:
    raise ValueError(f"--step={path}: expected DIR/{DIRECTORY}/STEP of a run: {error}") from error
  model, tx = Llama(from_config(c)), guarded(optimizer(c.train), c.train.max_skipped)
  rope = resolve.training_rope(c, facts["time"])
  mesh = sharding.make_mesh(c.mesh, c.train.batch_size // c.train.accumulation)
  with jax.set_mesh(mesh):
    trainable, frozen = state.split(c, state.initial_variables(c, mesh, workdir))
    placement = sharding.shardings(mesh, jax.eval_shape(tx.init, trainable))
    opt_state = jax.jit(tx.init, out_shardings=placement)(trainable)
    checkpoints = Checkpoints(path)
    abstract = state.abstract_of(dict(trainable=trainable, opt_state=opt_state))
    restored = checkpoints.restore(step, **abstract)
    checkpoints.close()
    trainable, opt_state = restored["trainable"], restored["opt_state"]
    shape, split = (c.train.batch_size, config_lib.train_length(c)), sharding.batch_sharding(mesh)
    placed = sharding.put_batch(lambda rows: {k: x[rows] for k, x in batch.items()}, shape, split)

    losses, gradients = _looked_into(model, c.train.loss_chunk)(trainable, frozen, placed, rope)
    order = np.argsort(attention.places(model.config, shape[1]))
    places = np.argwhere(~np.isfinite(jax.device_get(losses)[:, order]))
    variables = {**frozen, **trainable}
    bad = {
      "parameters": jax.device_get(_not_finite(variables)),
      "gradients": jax.device_get(gradients),
    }
    run = step_lib.train_step(
      model,
      tx,
      accumulation=c.train.accumulation,
      chunk=c.train.loss_chunk,
      placement=jax.tree.map(lambda x: x.sharding, (trainable, opt_state)),
    )
    _, _, values = run(trainable, opt_state, frozen, placed, rope)
    values = jax.device_get(values)
  return dict(
    step=step,
    loss=float(values["loss"]),
    grad_norm=float(values["grad_norm"]),
    losses=dict(count=len(places), first=[tuple(map(int, x)) for x in places[:5]]),
    **{
      name: {
        jax.tree_util.keystr(k, simple=True, separator="/"): int(n)
        for k, n in jax.tree_util.tree_leaves_with_path(tree)
        if n
      }
      for name, tree in bad.items()
    },
  )


def _looked_into(model: Llama, chunk: int):
  """(trainable, frozen, batch, rope) -> (weighted losses, bad entries of each gradient)."""

  @jax.jit
  def look(trainable, frozen, batch, rope):
    def losses(trainable):
      return step_lib.batch_losses(model, {**frozen, **trainable}, batch, rope, chunk)

    return losses(trainable), _not_finite(jax.grad(lambda x: jnp.sum(losses(x)))(trainable))

  return look


def _not_finite(tree):
  return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), tree)
