"""Orbax behind one small file: what training changes, saved atomically, restored onto any mesh.

Nothing is taken for whole that is not: with its arrays a checkpoint holds their checksums, which
are those of what was in memory, and beside the checkpoints stands which is the newest.
"""

from __future__ import annotations

import errno
import json
import os
import shutil

import orbax.checkpoint as ocp

from rope_jax.config import write_json
from rope_jax.errors import DiskError
from rope_jax.train import multihost
from rope_jax.train.digest import digest

# WORKDIR/saved.json: what this run has saved, as {"newest": step}.
SAVED_FILE = "saved.json"
# Errors of a restore that say nothing of the checkpoint, as the system and as libraries put them.
_CODES = (errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EPERM, errno.ESTALE)
_STATUSES = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Never: `preemption` asks, and jax counts every question."""
    return False


class Checkpoints:
  """Checkpoints of a run in WORKDIR/checkpoints.

  A checkpoint holds 'trainable' (collections of variables) and 'opt_state', as far as they are
  given, and 'digest', checksums of both. Frozen weights are not in it: they come from
  config.init_from again, as they did at the start.

  Args:
    workdir: of the run.
    keep: so many of the newest; None to read only, which another process may then write.
  """

  def __init__(self, workdir: str, *, keep: int | None = None):
    self._workdir = os.path.abspath(workdir)
    self._path = os.path.join(self._workdir, "checkpoints")
    self._pending: int | None = None  # a save that is under way
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, read_only=keep is None, cleanup_tmp_directories=True
    )
    self._keep, self._manager = keep, _Manager(self._path, options=options)

  def latest(self) -> int | None:
    """Steps done at the newest checkpoint, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Steps done at each checkpoint, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, **items) -> None:
    """Saves trees by name in the background; a kill at any moment leaves earlier ones whole.

    Raises:
      DiskError: if this save, or the one before it, cannot be written.
    """
    if step == self.latest():
      return
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    sums = {name: digest(tree) for name, tree in items.items()}
    with self._writing():
      self._manager.wait_until_finished()
      self._settle()
      self._manager.save(
        step, args=ocp.args.Composite(**args, digest=ocp.args.JsonSave(sums)), force=True
      )
    self._pending = step

  def poll(self) -> None:
    """Looks after the save under way, between two steps.

    Raises:
      DiskError: if it could not be written.
    """
    if self._pending is None:
      return
    with self._writing():
      self._manager.check_for_errors()
      self._settle()

  def restore(self, step: int, **abstract) -> dict:
    """Reads these items into the shapes, dtypes and shardings of the trees given for them.

    Raises:
      ValueError: if the checkpoint is damaged, or does not match.
    """
    found, why = self._read(step, abstract)
    if found is None:
      gone = not os.path.isdir(os.path.join(self._path, str(step)))
      what = "is gone: its run has saved newer ones; start again" if gone else f"is damaged: {why}"
      raise ValueError(f"--workdir={self._workdir}: the checkpoint after step {step} {what}")
    return found

  def resume(self, on_damage: str, **abstract) -> tuple[int, dict, str]:
    """The newest checkpoint that is whole.

    One that is damaged is moved to WORKDIR/damaged when an older one is whole.

    Args:
      on_damage: 'previous' (the one before the newest, if that is damaged) or 'stop'.
      **abstract: as of `restore`.

    Returns:
      (steps done, items, what is to be said of damage, or ''); (0, {}, '') of a run that has saved
      nothing yet.

    Raises:
      ValueError: if none is whole though some were saved, or the newest is damaged and on_damage
        is 'stop'.
    """
    steps, saved = self.steps(), self._saved()
    bad: dict[int, str] = {}
    if saved is not None and saved > max(steps, default=0):
      bad[saved] = "it was saved and is not there"
    for step in reversed(steps):
      if bad and on_damage == "stop":
        break
      found, why = self._read(step, abstract)
      if found is not None:
        self._tidy([s for s in bad if s in steps], [s for s in steps if s <= step])
        self._note(step)  # a kill may have come before that of the save
        return step, found, _said(bad, step)
      bad[step] = why
    if not bad:
      return 0, {}, ""
    newest, why = next(iter(bad.items()))
    others = ", ".join(str(s) for s in steps if s not in bad)
    hint = (
      f"there is one after step {others}: config.checkpoint.on_damage='previous' goes on from it"
      if others
      else "no other is whole, and a run does not begin anew by itself: choose another --workdir="
    )
    raise ValueError(
      f"config.checkpoint.on_damage={on_damage!r}: the checkpoint after step {newest} in "
      f"{self._path} is damaged: {why}; {hint}"
    )

  def close(self) -> None:
    """Waits for the last save.

    Raises:
      DiskError: if it cannot be written.
    """
    if self._keep is not None:
      with self._writing():
        self._manager.wait_until_finished()
        self._settle()
    self._manager.close()

  def _read(self, step: int, abstract: dict) -> tuple[dict | None, str]:
    """(items of a checkpoint, '') or (None, why it cannot be had)."""
    args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    why, elsewhere, found, known = "", "", {}, {}
    try:
      if not os.path.isdir(os.path.join(self._path, str(step), "digest")):
        raise ValueError("it has no checksums: it is damaged, or of an earlier version")
      found = dict(
        self._manager.restore(
          step, args=ocp.args.Composite(**args, digest=ocp.args.JsonRestore())
        ).items()
      )
      known = found.pop("digest")
    except Exception as error:  # of many types: whatever the damage makes the libraries stumble on
      why = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}"
      elsewhere = _elsewhere(error)
    if multihost.any_of(bool(elsewhere)):
      raise DiskError(f"{self._path}: the checkpoint after step {step} cannot be read: {elsewhere}")
    if multihost.any_of(bool(why)):
      return None, why or "another process could not read it"
    for name, tree in found.items():
      ours = digest(tree)
      for path, sums in ours.items():
        if known.get(name, {}).get(path) != sums:
          return None, f"{name}{path} is not what was saved"
    return found, ""

  def _writing(self):
    # On the disk: the manager counts what it only has begun.
    names = os.listdir(self._path) if os.path.isdir(self._path) else []
    whole = ", ".join(map(str, sorted(int(name) for name in names if name.isdigit())))
    return DiskError.explained(
      f"{self._path}: a checkpoint cannot be written",
      f"those after steps {whole} are whole" if whole else "there is no earlier one",
    )

  def _settle(self) -> None:
    """Notes a save that is whole by now: its directory has its final name."""
    if self._pending is not None and os.path.isdir(os.path.join(self._path, str(self._pending))):
      self._note(self._pending)
      self._pending = None

  def _note(self, step: int) -> None:
    if multihost.is_main() and self._saved() != step:
      write_json(os.path.join(self._workdir, SAVED_FILE), dict(newest=step))

  def _saved(self) -> int | None:
    path = os.path.join(self._workdir, SAVED_FILE)
    if not os.path.exists(path):
      return None
    try:
      with open(path) as f:
        return int(json.load(f)["newest"])
    except (KeyError, TypeError, ValueError):
      return None  # it only helps to notice what is not there

  def _tidy(self, damaged: list[int], whole: list[int]) -> None:
    """Moves damaged ones aside, and removes old ones that a kill has left beyond those to keep."""
    if self._keep is None:
      return
    if multihost.is_main():
      for step in damaged:
        os.makedirs(os.path.join(self._workdir, "damaged"), exist_ok=True)
        place = os.path.join(self._workdir, "damaged", str(step))
        while os.path.exists(place):
          place += "+"
        os.rename(os.path.join(self._path, str(step)), place)
      for step in whole[: -self._keep]:
        shutil.rmtree(os.path.join(self._path, str(step)))
    multihost.wait("tidy")
    self._manager.reload()


def _said(bad: dict[int, str], step: int) -> str:
  return "".join(
    f"the checkpoint after step {s} is damaged ({why}): going on from step {step}\n"
    for s, why in bad.items()
  )


def _elsewhere(error: BaseException | None) -> str:
  """What kept a checkpoint from being read that may be whole; '' if it is the checkpoint."""
  while error is not None:
    text = str(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _CODES:
      return text or type(error).__name__
    known = [x for x in (*_STATUSES, *map(os.strerror, _CODES)) if x in text]
    if known:
      return known[0]
    error = error.__cause__ or error.__context__
  return ""
