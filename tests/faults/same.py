"""Two workdirs of one command, compared bit for bit."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

CLOCK = ("tokens_per_second", "mfu")  # what a row says of the machine


def rows(workdir: Path) -> list[dict]:
  """Rows of metrics.jsonl without what the clock has a part in."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def check(ours: Path, theirs: Path) -> dict:
  """Compares all that is below two workdirs.

  Checkpoints are compared array by array, the optimizer's with the others; metrics.jsonl row by
  row; every other file byte by byte, those that a later version of the code adds among them.
  TensorBoard's events hold the time and are left out.

  Returns:
    Figures: rows, arrays and files compared.

  Raises:
    AssertionError: naming the first file, row or array that differs.
  """
  left = [str(p) for p in ours.rglob("*") if p.suffix == ".tmp" or "checkpoint-tmp" in p.name]
  assert not left, f"left over: {left}"
  names = _files(theirs)
  assert _files(ours) == names
  compared = dict(rows=0, arrays_compared=0, files_compared=len(names), bytes_different=0)
  for name in names:
    if Path(name).name == "metrics.jsonl":
      compared["rows"] += _check_rows(
        name, rows((ours / name).parent), rows((theirs / name).parent)
      )
    else:
      assert _content(ours, name) == _content(theirs, name), f"{name} differs"
  for path in sorted(theirs.rglob("checkpoints")):
    compared["arrays_compared"] += _check_checkpoints(ours / path.relative_to(theirs), path)
  return compared


def _files(workdir: Path) -> list[str]:
  """Files by their name below a workdir, without checkpoints, TensorBoard's and who holds it."""
  found = [p.relative_to(workdir) for p in workdir.rglob("*") if p.is_file()]
  return sorted(
    str(p)
    for p in found
    if "checkpoints" not in p.parts and "tfevents" not in p.name and p.suffix != ".lock"
  )


def _content(workdir: Path, name: str) -> bytes:
  """A file, but for where the workdir is."""
  return (workdir / name).read_bytes().replace(str(workdir).encode(), b"WORKDIR")


def _check_rows(name: str, ours: list[dict], theirs: list[dict]) -> int:
  """Rows, each once and in order."""
  keys = [[(row["step"], *row) for row in found] for found in (ours, theirs)]
  assert keys[0] == keys[1], f"{name}: other rows, or in another order"
  for a, b in zip(ours, theirs, strict=True):
    assert a == b, f"{name}: {a} is not {b}"  # floats as Python prints them: all their bits
  return len(theirs)


def _check_checkpoints(ours: Path, theirs: Path) -> int:
  """The same steps are kept, and every array of each is the same."""
  steps = [sorted(p.name for p in d.iterdir() if p.is_dir()) for d in (ours, theirs)]
  assert steps[0] == steps[1], f"{ours}: kept are {steps[0]}, not {steps[1]}"
  return sum(_check_arrays(ours / step, theirs / step) for step in steps[1])


def _check_arrays(ours: Path, theirs: Path) -> int:
  items = sorted(p.name for p in theirs.iterdir() if (p / "_METADATA").exists())
  assert "opt_state" in items and "trainable" in items, items
  count = 0
  with ocp.PyTreeCheckpointer() as reader:
    for item in items:
      a, b = (dict(_leaves(reader.restore(str(d / item)))) for d in (ours, theirs))
      assert a.keys() == b.keys(), f"{ours / item}"
      for key in b:
        same = a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
        same = same and a[key].tobytes() == b[key].tobytes()
        assert same, f"{ours / item}: {key} differs"
      count += len(b)
  return count


def _leaves(tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path), np.asarray(leaf)
