"""Orbax behind one small file: what training changes, saved atomically, restored onto any mesh."""

from __future__ import annotations

import os

import orbax.checkpoint as ocp


class Checkpoints:
  """Checkpoints of a run in WORKDIR/checkpoints.

  A checkpoint holds 'trainable' (collections of variables) and 'opt_state'. Frozen weights are
  not in it: they come from config.init_from again, as they did at the start.
  """

  def __init__(self, workdir: str, *, keep: int = 2):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    path = os.path.join(os.path.abspath(workdir), "checkpoints")
    self._manager = ocp.CheckpointManager(path, options=options)

  def latest(self) -> int | None:
    """Steps done at the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Steps done at each whole checkpoint, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, **items) -> None:
    """Saves trees by name in the background; a kill at any moment leaves earlier ones whole."""
    if step != self.latest():
      args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
      self._manager.save(step, args=ocp.args.Composite(**args))

  def restore(self, step: int, **abstract) -> dict:
    """Reads these items into the shapes, dtypes and shardings of the trees given for them.

    Raises:
      ValueError: if the checkpoint does not match.
    """
    args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    return dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())

  def close(self) -> None:
    """Waits for the last save."""
    self._manager.wait_until_finished()
    self._manager.close()
