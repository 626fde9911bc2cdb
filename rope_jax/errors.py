"""Errors that name the key of the config, its value and what was expected; and of the disk."""

from __future__ import annotations

import contextlib
import errno
import os

MOST = 2**31 - 1  # of a whole number: positions, steps and sizes are int32 on the devices


def check(condition, key: str, value, expected: str) -> None:
  """Raises ValueError for config.KEY unless the condition holds."""
  if not condition:
    raise ValueError(f"config.{key}={value!r}: expected {expected}")


def choice(key: str, value, choices) -> None:
  """Raises ValueError for config.KEY unless the value is one of the choices."""
  check(value in choices, key, value, "one of " + ", ".join(map(repr, choices)))


class Preempted(Exception):
  """The notice has come, and what there was to save is saved."""

  EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start it again


class DiskError(Exception):
  """Something could not be written; what there was before is whole."""

  CODES = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
  )  # fmt: skip

  @classmethod
  @contextlib.contextmanager
  def explained(cls, what: str, then: str):
    """Makes one of what goes wrong within: an OSError, or what libraries make of it.

    Args:
      what: could not be done.
      then: is so nevertheless.
    """
    try:
      yield
    except Exception as error:
      found = _os_error(error)
      if not found:
        raise
      raise cls(f"{what}: {found}; {then}") from error


def _os_error(error: BaseException | None) -> str:
  """What the system said, of an error or of what it came from; '' if it was not the system."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in DiskError.CODES:
      return os.strerror(error.errno)
    # Libraries write of it, and the OSError itself is lost on the way.
    said = [os.strerror(code) for code in DiskError.CODES if os.strerror(code) in str(error)]
    if said:
      return said[0]
    error = error.__cause__ or error.__context__
  return ""
