"""The notebooks of launch/colab run from top to bottom, and what is stored is of such a run."""

import importlib.util
import re

import nbformat
import pytest
from conftest import ROOT

_spec = importlib.util.spec_from_file_location("execute", ROOT / "launch/colab/execute.py")
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)

MOST_BYTES = 400_000
# Of two names or more; not a part of a URL, of 'and/or', nor of a relative path.
_PATH = re.compile(r"(?<![\w.:/*~-])(?:~|/[\w.+-]+)/[\w.+-]+")


def complaints(notebook) -> list[str]:
  """What is wrong with the outputs of a notebook, if it has been run from top to bottom."""
  out = []
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  counts = [cell.execution_count for cell in code]
  if counts != list(range(1, len(code) + 1)):
    out.append(f"not one run from top to bottom: {counts}")
  if notebook.metadata.get("executed") != execute.digest(notebook):
    out.append("outputs of other code")
  for cell in code:
    for output in cell.outputs:
      text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
      if output.output_type == "error" or output.get("name") == "stderr":
        out.append(f"{cell.id}: {output.get('ename', '')} {text}")
      out += [f"{cell.id}: a path of a machine: {path}" for path in _PATH.findall(text)]
      out += [f"{cell.id}: {word}" for word in re.findall("(?i)warning|traceback|error:", text)]
  return out


def pictures(notebook) -> int:
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
  return sum("image/png" in o.get("data", {}) for o in outputs)


def install_cell(notebook) -> str:
  return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


# ---- As they are stored.


@pytest.mark.parametrize("name", execute.NAMES)
def test_stored_notebooks_are_valid_small_and_of_one_clean_run(name):
  notebook = execute.read(name)
  nbformat.validate(notebook)
  assert (execute.HERE / f"{name}.ipynb").stat().st_size < MOST_BYTES
  assert complaints(notebook) == []
  assert pictures(notebook) >= 2
  assert "assert" in [c for c in notebook.cells if c.cell_type == "code"][-1].source
  assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_there_are_three_and_the_readme_names_them():
  readme = (ROOT / "README.md").read_text()
  assert len(execute.NAMES) == 3
  assert all(f"launch/colab/{name}.ipynb" in readme for name in execute.NAMES)


def _stream(name, text):
  return nbformat.v4.new_output("stream", name=name, text=text)


_WRONG = dict(
  run_again=lambda cells, _: cells[1].update(execution_count=7),
  not_run=lambda cells, _: cells[1].update(execution_count=None),
  edited=lambda cells, _: cells[0].update(source="x = 2"),
  never_executed=lambda _, metadata: metadata.pop("executed"),
  chatter=lambda cells, _: cells[1].outputs.append(_stream("stderr", "loading")),
  warned=lambda cells, _: cells[1].outputs.append(_stream("stdout", "UserWarning: old")),
  a_path=lambda cells, _: cells[1].outputs.append(_stream("stdout", "in /home/me/runs")),
  a_home=lambda cells, _: cells[1].outputs.append(_stream("stdout", "in ~/runs")),
  failed=lambda cells, _: cells[1].outputs.append(nbformat.v4.new_output("error", ename="E")),
)


def _clean():
  cells = [nbformat.v4.new_code_cell(s, execution_count=i + 1) for i, s in enumerate("xy")]
  cells[1].outputs = [_stream("stdout", "runs/a/b, and/or 3 tokens/s of https://x.org/y/z\n")]
  notebook = nbformat.v4.new_notebook(cells=cells)
  notebook.metadata["executed"] = execute.digest(notebook)
  return notebook


@pytest.mark.parametrize("what", _WRONG)
def test_a_notebook_that_is_not_clean_is_noticed(what):
  notebook = _clean()
  assert complaints(notebook) == []
  _WRONG[what](notebook.cells, notebook.metadata)
  assert complaints(notebook) != []


# ---- The cell that installs.


def test_the_install_cell_is_the_first_and_the_same_in_all():
  first, *others = [install_cell(execute.read(name)) for name in execute.NAMES]
  assert "pip install" in first and set(others) == {first}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("checkout", [True, False])
def test_installs_what_is_missing_from_the_checkout_or_the_repository(
  installed, checkout, tmp_path, monkeypatch
):
  from IPython.core.inputtransformer2 import TransformerManager

  here = tmp_path / "a b" / "launch" / "colab"
  here.mkdir(parents=True)
  if checkout:
    (tmp_path / "a b" / "setup.cfg").touch()
  monkeypatch.chdir(here)
  monkeypatch.setattr("sys.path", path := ["x"])
  monkeypatch.setattr("importlib.util.find_spec", lambda name: "there" if installed else None)
  code = TransformerManager().transform_cell(install_cell(execute.read(execute.NAMES[0])))
  calls = []

  class Shell:
    def run_line_magic(self, magic, line):
      calls.append(f"{magic} {line}".format(**names))

  names = dict(get_ipython=Shell)
  exec(code, names)
  expected = f'-e "{tmp_path / "a b"}"' if checkout else f'"{names["REPOSITORY"]}"'
  assert calls == ([] if installed else [f"pip install -q {expected}"])
  # What is installed editable must be found by the kernel that runs already.
  assert (str(tmp_path / "a b") in path) == (checkout and not installed)
  assert names["REPOSITORY"].startswith("git+https://")


# ---- Run again. Each ends with the assertions that its text depends on.


@pytest.mark.long
@pytest.mark.parametrize("name", execute.NAMES)
def test_runs_clean_from_a_fresh_kernel(name):
  notebook = execute.execute(name)
  assert complaints(notebook) == []
  assert pictures(notebook) == pictures(execute.read(name))


def test_a_cell_that_fails_fails_the_execution(tmp_path, monkeypatch):
  from nbclient.exceptions import CellExecutionError

  monkeypatch.setattr(execute, "HERE", tmp_path)
  cells = [nbformat.v4.new_code_cell(s) for s in ("import os, rope_jax", "print(os.listdir())")]
  for name, last in dict(good="1 + 1", bad="assert 1 + 1 == 3").items():
    notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(last)])
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
  done = execute.execute("good")
  assert complaints(done) == []
  assert done.cells[1].outputs[0].text == "[]\n"  # an empty directory
  with pytest.raises(CellExecutionError, match="1 == 3|AssertionError"):
    execute.execute("bad")
