"""A TFDS builder for text files, so that they go the same way as catalogue corpora."""

from __future__ import annotations

import dataclasses
import hashlib
import os

import tensorflow_datasets as tfds

VALIDATION_SHARE = 20  # one document in so many is held out


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
      yield name, {"name": name, "text": read_text(path)}


def builder_of(files: dict[str, str], data_dir: str) -> RopeJaxText:
  """The builder for these files (name -> path)."""
  state = hashlib.sha256()
  for name, path in files.items():
    status = os.stat(path)
    state.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
  config = TextFiles(name=state.hexdigest()[:16], files=files)
  return RopeJaxText(config=config, data_dir=data_dir, file_format="array_record")


def read_text(path: str) -> str:
  """A file as UTF-8; bytes that are not become U+FFFD."""
  with open(path, encoding="utf-8", errors="replace") as f:
    return f.read()


def _split_of(name: str) -> str:
  number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
  return "train" if number % VALIDATION_SHARE else "validation"
