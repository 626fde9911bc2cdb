"""One process at a time for a workdir."""

from __future__ import annotations

import errno
import fcntl
import os
import platform

from rope_jax.train import multihost

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of mounts that have none


class Lock:
  """A file of a workdir that one process at a time may hold; the system frees it when that ends.

  Of several processes of one run, the main one holds it for all. On a network mount it depends on
  the mount whether another machine sees it.

  Args:
    workdir: of the run.
    what: that is kept to one: 'train' or 'evaluate'.
  """

  def __init__(self, workdir: str, what: str):
    self._workdir, self._path = workdir, os.path.join(workdir, f".{what}.lock")
    self._file = None

  def __enter__(self) -> Lock:
    """Holds it if the workdir is there already; else that is for `take` to do."""
    if multihost.of_main(os.path.isdir(self._workdir)):
      self.take()
    return self

  def __exit__(self, *_) -> None:
    if self._file:
      self._file.close()
      self._file = None

  def take(self) -> None:
    """Makes the workdir and holds it.

    Raises:
      ValueError: if another process does, or nothing can be written there.
    """
    error = self._taken() if multihost.is_main() and not self._file else ""
    # All processes must refuse, or some would wait for the others.
    if multihost.any_of(bool(error)):
      raise ValueError(error or f"--workdir={self._workdir}: the main process could not take it")

  def _taken(self) -> str:
    """Takes it; what went wrong, or ''."""
    file = None
    try:
      os.makedirs(self._workdir, exist_ok=True)
      file = open(self._path, "a+")  # noqa: SIM115 - closed by __exit__
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip() or "unknown"
      file.close()
      return (
        f"--workdir={self._workdir}: another run is at work there ({holder}); wait for it, stop "
        "it, or choose another"
      )
    except OSError as error:
      if error.errno in _NO_LOCKS:
        print(
          f"{self._workdir}: {error.strerror}: other runs there will not be noticed", flush=True
        )
        self._file = file
        return ""
      if file:
        file.close()
      return f"--workdir={self._workdir}: nothing can be written there: {error.strerror}"
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    self._file = file
    return ""
