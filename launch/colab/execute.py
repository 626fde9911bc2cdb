"""Executes the notebooks of this directory, each in a fresh kernel and an empty directory.

  python launch/colab/execute.py                       # all; fails where a cell does
  python launch/colab/execute.py 01_rope_methods       # one
  python launch/colab/execute.py --write               # and stores the outputs in the notebooks

The kernel is that of this Python, on the CPU, without the user's start-up files; it imports
rope_jax from this checkout. Needs the extra test.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
COLOURS = 64
NAMES = sorted(path.stem for path in HERE.glob("*.ipynb"))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("names", metavar="NAME", nargs="*", help="which; all if none")
  parser.add_argument("--write", action="store_true", help="store the outputs")
  arguments = parser.parse_args()
  for name in arguments.names:
    if name not in NAMES:
      parser.error(f"{name}: expected one of {', '.join(NAMES)}")
  for name in arguments.names or NAMES:
    start = time.perf_counter()
    notebook = execute(name)
    if arguments.write:
      write(name, notebook)
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def read(name: str):
  """A notebook as it is stored."""
  import nbformat

  return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def execute(name: str):
  """A notebook with the outputs of a run from top to bottom.

  Raises:
    nbclient.exceptions.CellExecutionError: if a cell fails.
  """
  from jupyter_client.kernelspec import KernelSpecManager
  from jupyter_client.manager import AsyncKernelManager
  from nbclient import NotebookClient

  notebook = read(name)
  with tempfile.TemporaryDirectory() as scratch:
    work = Path(scratch) / "work"
    work.mkdir()
    # Installed kernels could be of another Python: without them there is that of this one.
    # By files, not ports, which others on the machine could connect to.
    manager = AsyncKernelManager(
      kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
      connection_file=f"{scratch}/kernel.json",
      transport="ipc",
      ip=f"{scratch}/kernel",
    )
    client = NotebookClient(
      notebook,
      km=manager,
      resources=dict(metadata=dict(path=str(work))),
      startup_timeout=600,
      record_timing=False,
      coalesce_streams=True,
    )
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    client.execute(
      cleanup_kc=True,  # it stops its own managers only
      env=os.environ
      | dict(
        PYTHONPATH=os.pathsep.join(paths), JAX_PLATFORMS="cpu", IPYTHONDIR=f"{scratch}/ipython"
      ),
    )
  notebook.metadata["language_info"] = dict(name="python")  # not which version it was
  notebook.metadata["executed"] = digest(notebook)
  return notebook


def write(name: str, notebook) -> None:
  """Stores a notebook with its outputs; pictures are made small, as a repository keeps them all."""
  import nbformat

  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      data = output.get("data", {})
      if "image/png" in data:
        data["image/png"] = _smaller(data["image/png"])
  nbformat.write(notebook, HERE / f"{name}.ipynb")


def _smaller(png: str) -> str:
  """A picture in base64, in a palette: of lines and text nothing is lost that could be seen."""
  from PIL import Image

  picture, out = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
  picture.convert("RGB").quantize(COLOURS).save(out, "png", optimize=True)
  return base64.b64encode(out.getvalue()).decode()


def digest(notebook) -> str:
  """Of the code: tells outputs of this code from those of an earlier one."""
  code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
  return hashlib.sha256(code.encode()).hexdigest()[:16]


if __name__ == "__main__":
  main()
