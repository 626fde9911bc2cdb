"""A TFDS builder for text files, so that they go the same way as catalogue corpora."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat

import tensorflow_datasets as tfds

VALIDATION_SHARE = 20  # one document in so many is held out
# A record has at most 2 GiB, and a byte that is no UTF-8 becomes three.
MOST_BYTES = 2**29


class Unreadable(ValueError):
  """A file that is no document, named in the message."""


@dataclasses.dataclass(eq=False)
class TextFiles(tfds.core.BuilderConfig):
  """Named by the state of the files, so that a changed file means a new dataset."""

  files: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)


class RopeJaxText(tfds.core.GeneratorBasedBuilder):
  """Text files, a document each."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"name": tfds.features.Text(), "text": tfds.features.Text()}
    )
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, dl_manager):
    splits = {}
    for name, path in self.builder_config.files.items():
      if read_text(path).strip():
        splits.setdefault(_split_of(name), {})[name] = path
    return {split: self._generate_examples(files) for split, files in splits.items()}

  def _generate_examples(self, files):
    for name, path in files.items():
      # A key of bytes: of text, TFDS takes '\\' and '/' for the same.
      yield os.fsencode(name), {"name": _printable(name), "text": read_text(path)}
    if _state(self.builder_config.files) != self.builder_config.name:
      raise Unreadable("files have changed while they were read; start again when they do not")


def builder_of(files: dict[str, str], data_dir: str) -> RopeJaxText:
  """The builder for these files (name -> path).

  Raises:
    Unreadable: if there is one that is not there. What else is wrong shows when it is prepared.
  """
  config = TextFiles(name=_state(files), files=files)
  return RopeJaxText(config=config, data_dir=data_dir, file_format="array_record")


def read_text(path: str) -> str:
  """A file as UTF-8; bytes that are not become U+FFFD, and each end of a line a newline.

  Raises:
    Unreadable: if it is no regular file, too large for a document, or cannot be read.
  """
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # it might be endless, or wait for somebody to write
      raise Unreadable(f"{path!r} is not a regular file")
    if status.st_size > MOST_BYTES:
      raise Unreadable(f"{path!r} has {status.st_size:,} bytes; a document has at most 2^29")
    if not status.st_size:  # files of /proc, some of which wait, say so too
      return ""
    with open(path, encoding="utf-8", errors="replace") as f:
      return f.read()
  except OSError as error:
    raise Unreadable(f"{path!r}: {error.strerror}") from error


def _state(files: dict[str, str]) -> str:
  """Of the names, places, sizes and times of files (name -> path)."""
  state = hashlib.sha256()
  for name, path in files.items():
    try:
      status = os.stat(path)
    except OSError as error:
      raise Unreadable(f"{path!r}: {error.strerror}") from error
    line = f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
    state.update(os.fsencode(line))
  return state.hexdigest()[:16]


def _printable(name: str) -> str:
  """A name whose bytes need not be UTF-8 as text."""
  return os.fsencode(name).decode("utf-8", errors="replace")


def _split_of(name: str) -> str:
  number = int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16)
  return "train" if number % VALIDATION_SHARE else "validation"
