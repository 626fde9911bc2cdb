"""Documents, random access, through tensorflow-datasets.

Catalogue corpora and folders of text go the same way: a `tfds.data_source`. Only preparing some
corpora of the catalogue (pg19 is one) needs TensorFlow. The embedded default
is the source code of Python's standard library: megabytes of real, long documents on every
machine that can run this, though their exact text depends on the version of Python.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig

from rope_jax import paths

# Directories of the standard library that are absent on some machines, or not its own.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "config"}
# What TFDS takes as a name, but for a namespace before it, whose code would be downloaded and run,
# and arguments after it.
_CATALOGUE_NAME = re.compile(r"[a-zA-Z]\w*(/[\w+.-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?")


def documents(
  source: str, split: str, data_dir: str, text_key: str = "", key: str = "config.data.source"
):
  """A corpus as a random-access sequence of documents.

  Args:
    source: 'stdlib', 'tfds:NAME' (a corpus of the TFDS catalogue, downloaded and prepared if need
      be), or a folder, file or glob of text files. Of a folder and of a glob, what is no regular
      file (a device, a pipe, a link to nowhere) and what is hidden is left out.
    split: 'train' or 'validation'; of our own corpora, one document in twenty (by the hash of its
      name) is held out for validation.
    data_dir: where prepared corpora live.
    text_key: the feature with the text; '' if there is only one.
    key: what errors call the source.

  Returns:
    A sequence: len(), and [i] -> str. Its `fingerprint` identifies the text for caches.

  Raises:
    ValueError: if there is nothing there, or it cannot be read, or changes while it is; if the
      split is empty, or text_key is needed. Nothing is kept of what was prepared until then.
  """
  import tensorflow_datasets as tfds

  from rope_jax.data.text_builder import Unreadable, builder_of

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  if source.startswith("tfds:"):
    builder = _of_catalogue(source, data_dir, key)
  else:
    try:
      builder = _prepared(lambda: builder_of(text_files(source, key), data_dir))
    except Unreadable as error:
      raise ValueError(f"{key}={source!r}: {error}") from None
    if not builder.info.splits:
      raise ValueError(f"{key}={source!r}: all of its files are empty")
    text_key = "text"
  sizes = {name: s.num_examples for name, s in builder.info.splits.items()}
  if sizes and not sizes.get(split):
    raise ValueError(f"{key}={source!r} has no documents in split {split!r}; it has {sizes}")
  return _Documents(builder, split, _text_feature(builder, text_key))


def text_files(source: str, key: str = "config.data.source") -> dict[str, str]:
  """Name -> path of the files of 'stdlib', a folder (with all below it), a file or a glob.

  Raises:
    ValueError: if there are none, naming the key.
  """
  if source == "stdlib":
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for directory, below, files in os.walk(root):
      below[:] = [d for d in below if d not in _NOT_STDLIB and not d.startswith(("config-", "__"))]
      found += [os.path.join(directory, f) for f in files if f.endswith(".py")]
  elif os.path.isdir(source):
    root = source
    found = paths.below(source)
  else:
    found = paths.files(source)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in found]) if found else ""
  out = {os.path.relpath(p, root): os.path.abspath(p) for p in found if os.path.isfile(p)}
  if not out:
    raise ValueError(f"{key}={source!r}: there are no text files")
  return dict(sorted(out.items()))


class _Documents:
  """Texts of one split of a prepared builder."""

  def __init__(self, builder, split: str, text_key: str):
    self._source = builder.as_data_source(split=split)
    self._key = text_key
    info = builder.info
    self.fingerprint = f"{info.name}-{builder.builder_config and builder.builder_config.name}"
    self.fingerprint += f"-{info.version}-{split}-{text_key}-{len(self)}"

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> str:
    text = self._source[i][self._key]
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else str(text)


def _text_feature(builder, key: str) -> str:
  """The feature with the text: `key`, or the only one of type Text."""
  import tensorflow_datasets as tfds

  features = builder.info.features
  texts = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
  if key in features or (not key and len(texts) == 1):
    return key or texts[0]
  raise ValueError(f"config.data.text_key={key!r}: expected one of {texts or sorted(features)}")


def _of_catalogue(source: str, data_dir: str, key: str):
  """The prepared builder of 'tfds:NAME'."""
  import tensorflow_datasets as tfds

  name, options = source.removeprefix("tfds:"), dict(file_format="array_record")
  if not _CATALOGUE_NAME.fullmatch(name):
    raise ValueError(
      f"{key}={source!r}: expected 'tfds:NAME', 'tfds:NAME/CONFIG' or these with ':VERSION', of "
      "the catalogue that comes with TFDS"
    )
  try:
    return _prepared(lambda: tfds.builder(name, data_dir=data_dir, **options), **options)
  except ModuleNotFoundError as error:
    if error.name != "tensorflow":
      raise
    raise ValueError(
      f"{key}={source!r}: preparing this corpus for the first time needs "
      "TensorFlow: pip install 'rope-jax[catalogue]' (reading it afterwards does not)"
    ) from None
  # It asserts that a version is one that it has.
  except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f"{key}={source!r}: {first}") from error


def _prepared(make, **options):
  """The builder that `make` gives, its corpus prepared, be it by another process meanwhile."""
  builder = make()
  try:
    builder.download_and_prepare(**options)
  except FileExistsError:  # the other was first: what is there is whole
    builder = make()
    builder.download_and_prepare(**options)
  return builder
