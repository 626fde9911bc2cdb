"""What a model has answered to an evaluation, kept until that is done: a killed one goes on.

An evaluation is a function of what the model answers to its questions (`evals.Subject`): so answers
are all that must be kept. They are found again by the question itself, and only under the same
model, settings and code.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import rope_jax
from rope_jax import resolve
from rope_jax.errors import DiskError
from rope_jax.train import multihost, preemption
from rope_jax.train.digest import digest


class Answers:
  """Arrays by question in a file: a line of JSON and the bytes, for each.

  Args:
    path: of the file.
    identity: of all that answers depend on besides the question; another one begins anew.
    together: whether several processes may be stopped by a notice between answers (see
      `preemption.check`).
  """

  def __init__(self, path: str, identity: str, together: bool = False):
    self._path, self._together = path, together
    self._places, end = _read(path, identity)
    self._asked: collections.Counter = collections.Counter()
    known = zlib.crc32(str(end).encode()) >> 1  # in the 31 bits that processes exchange
    if multihost.any_of(known != multihost.of_main(known)):  # a mount that is behind
      self._places, end = {}, 0
    multihost.wait("answers")  # all have read what there was
    self.kept = len(self._places)
    self._file = None
    if multihost.is_main():
      self._file = open(path, "r+b" if os.path.exists(path) else "w+b")  # noqa: SIM115
      self._file.truncate(end)
      if not end:
        self._file.write(identity.encode() + b"\n")
        self._file.flush()
      self._file.seek(0, os.SEEK_END)

  def ask(self, question: list, answer: Callable[[], np.ndarray]) -> np.ndarray:
    """The answer that is kept, or else the one that is computed now.

    Args:
      question: numbers, texts and arrays.
      answer: computes it: an array.

    Raises:
      Preempted: if the notice has come; what was answered is kept.
      DiskError: if it cannot be written.
    """
    preemption.check(self._together)
    key = _key(question)
    self._asked[key] += 1  # a question may come twice, with something else to it that is no number
    key = f"{key}-{self._asked[key]}"
    if key in self._places:
      return self._load(*self._places[key])
    found = np.asarray(answer())
    if self._file:
      data = np.ascontiguousarray(found).tobytes()
      about = dict(key=key, dtype=str(found.dtype), shape=found.shape)
      about["crc"] = _checksum(about["key"], about["dtype"], found.shape, data)
      then = "what was answered before is kept"
      with DiskError.explained(f"{self._path}: an answer cannot be written", then):
        self._file.write(json.dumps(about).encode() + b"\n" + data)
        self._file.flush()
        os.fsync(self._file.fileno())
    return found

  def close(self) -> None:
    if self._file:
      with contextlib.suppress(OSError):  # what could not be written has been said
        self._file.close()

  def _load(self, place: int, dtype: str, shape: tuple) -> np.ndarray:
    return np.fromfile(self._path, dtype, int(np.prod(shape)), offset=place).reshape(shape)


@contextlib.contextmanager
def kept(c, workdir: str, which: str, variables: dict, *, together=False, keep=False):
  """The answers of a model to the evaluations of a config; on the mesh that is set.

  Args:
    c: a config.
    workdir: where they are.
    which: of what command: 'train' or 'evaluate'.
    variables: of the model.
    together: as of `Answers`.
    keep: whether they stay when all is answered, until `forget`.
  """
  path = os.path.join(workdir, f".{which}.answers")
  answers = Answers(path, _identity(c, variables), together)
  if answers.kept and multihost.is_main():
    print(f"evaluations: {answers.kept} answers of the model are there already", flush=True)
  try:
    yield answers
  finally:
    answers.close()
  if not keep:
    forget(workdir, which)


def forget(workdir: str, which: str) -> None:
  """Deletes the answers of a command; those of another may be needed at this moment."""
  if multihost.is_main():
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(workdir, f".{which}.answers"))


def _identity(c, variables) -> str:
  """Of a model and of what it is asked under."""
  facts = dict(
    config={k: v for k, v in c.to_dict().items() if k != "checkpoint"},
    rope=resolve.describe(c),
    variables=digest(variables),
    mesh=[str(jax.sharding.get_abstract_mesh()), jax.process_count(), jax.devices()[0].device_kind],
    versions=[jax.__version__, rope_jax.__version__, _code()],
  )
  return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _code() -> str:
  """Of the source of this package: answers of other code are not those of this."""
  root, state = Path(rope_jax.__file__).parent, hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    state.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  return state.hexdigest()


def _key(question: list) -> str:
  state = hashlib.sha256()
  for part in question:
    if isinstance(part, np.ndarray):
      state.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
    else:
      state.update(repr(part).encode())
    state.update(b"\0")
  return state.hexdigest()


def _checksum(*parts) -> int:
  return functools.reduce(lambda sum, part: zlib.crc32(repr(part).encode(), sum), parts, 0)


def _read(path: str, identity: str) -> tuple[dict, int]:
  """(question -> place, dtype and shape of its answer, end of what is whole) of a file."""
  places: dict[str, tuple] = {}
  if not os.path.exists(path):
    return places, 0
  with open(path, "rb") as f:
    if f.readline() != identity.encode() + b"\n":
      return places, 0
    end = f.tell()
    while line := f.readline():
      try:
        about = json.loads(line)
        dtype, shape, key = np.dtype(about["dtype"]), tuple(about["shape"]), about["key"]
        data = f.read(int(np.prod(shape)) * dtype.itemsize)
        whole = _checksum(key, str(dtype), shape, data) == about["crc"]
      except (KeyError, TypeError, ValueError):  # cut off, or worse
        break
      if not whole:
        break
      places[key] = (end + len(line), str(dtype), shape)
      end = f.tell()
  return places, end
