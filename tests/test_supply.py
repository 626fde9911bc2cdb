"""What we depend on is bounded and has a reason, and nothing that is read can run code."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# ---- Dependencies


def requirements(text):
  """(requirement, the line above it) of install_requires and of all extras."""
  section, lines = "", text.splitlines()
  for above, line in zip(["", *lines], lines):
    if line.startswith("["):
      section, key = line.strip("[]"), ""
    elif not line[:1].isspace():
      key = line.partition("=")[0].strip()
    elif (
      section == "options.extras_require" or (section, key) == ("options", "install_requires")
    ) and not line.strip().startswith("#"):
      yield line.strip(), above


def unbounded(text):
  """Requirements without two bounds, or without a reason in the line above."""
  out = []
  for requirement, above in requirements(text):
    specifier = requirement.partition(";")[0]
    exact = re.search(r" == \d", specifier)
    bounds = re.search(r" >= \d[\d.]*, < \d[\d.]*\Z", specifier.strip())
    if not (exact or bounds) or not re.fullmatch(r"\s+# .*\w.*", above):
      out.append(requirement)
  return out


def test_each_dependency_has_two_bounds_and_a_reason():
  text = (ROOT / "setup.cfg").read_text()
  assert unbounded(text) == []
  names = [re.match(r"[\w-]+", r)[0] for r, _ in requirements(text)]
  assert len(names) > 25 and {"jax", "tokenizers", "tensorflow", "pytest"} <= set(names)


@pytest.mark.parametrize("line", ["", ">= 1", "< 2", "== *", "> 1, != 1.5", ">= 1, <= 2"])
def test_a_dependency_without_bounds_is_noticed(line):
  for head in ("[options]\ninstall_requires =\n", "[options.extras_require]\nx =\n"):
    assert unbounded(f"{head}    # Why.\n    some {line}\n") == [f"some {line}".strip()]
    assert unbounded(f"{head}    some >= 1, < 2\n") == ["some >= 1, < 2"]  # no reason
    assert unbounded(f"{head}    # Why.\n    some >= 1, < 2\n") == []


def test_scripts_install_nothing_without_its_version():
  for path in (ROOT / "launch").glob("*.sh"):
    for line in re.findall(r"^[^#\n]*(pip install.*)", path.read_text(), re.M):
      named = [x for x in line.split()[2:] if re.match(r"['\"]?[a-z]", x)]
      assert all("==" in x for x in named), f"{path.name}: {line}"


# ---- What may run code, or reach the network

_MODULES = {
  "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "urllib", "urllib3",
  "requests", "httpx", "http", "socket", "ftplib", "aiohttp", "smtplib", "xmlrpc", "telnetlib",
  "code", "codeop", "pty",
}  # fmt: skip
_CALLS = {
  "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp",
  "os.spawnv", "joblib.load", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
  "pandas.read_pickle", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
_TRUE = ("shell", "allow_pickle", "trust_remote_code")  # arguments that must not be

# file -> what it may, and why
ALLOWED = {
  # transformers runs the modelling file of an export, after `_has_our_code` has found it to be
  # byte for byte the one of this package; everything else is loaded with False.
  "rope_jax/export/verify.py": ["trust_remote_code"],
}


def dangers(source):
  """Names of what a source imports or calls that could run what it reads, or connect."""
  tree = ast.parse(source)
  names = _imported(tree)  # name here -> what it is
  found = {full.split(".")[0] for full in names.values()} & _MODULES
  for node in ast.walk(tree):
    if isinstance(node, ast.Name | ast.Attribute):
      first, dot, rest = ast.unparse(node).partition(".")
      full = names.get(first, first) + dot + rest
      found |= {full} & _CALLS  # called, or passed on to be called
    elif isinstance(node, ast.Call):
      found |= {name for name, value in _keywords(node) if name in _TRUE and not _is_false(value)}
      if ast.unparse(node.func).endswith("import_module"):
        found |= {x.value for x in node.args if isinstance(x, ast.Constant)} & _MODULES
  return sorted(found)


def _imported(tree):
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for a in node.names:
        first = a.name.partition(".")[0]
        names[a.asname or first] = a.name if a.asname else first
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
  return names


def _keywords(call):
  """(name, value) of a call's keywords, also of a dict that is spread."""
  for k in call.keywords:
    if k.arg:
      yield k.arg, k.value
    elif isinstance(k.value, ast.Dict):
      yield from ((x.value, v) for x, v in zip(k.value.keys, k.value.values)
                  if isinstance(x, ast.Constant))  # fmt: skip


def _is_false(node) -> bool:
  return isinstance(node, ast.Constant) and node.value is False


SAMPLES = {
  "import pickle": ["pickle"],
  "import os, dill": ["dill"],
  "def f():\n  from cloudpickle import loads": ["cloudpickle"],
  "import shelve as s": ["shelve"],
  "from marshal import loads": ["marshal"],
  "import joblib\njoblib.load(x)": ["joblib.load"],
  "from joblib import load\nload(x)": ["joblib.load"],
  "eval('1')": ["eval"],
  "exec(x)": ["exec"],
  "list(map(eval, x))": ["eval"],
  "compile(x, '', 'exec')": ["compile"],
  "__import__(x)": ["__import__"],
  "import os\nos.system(x)": ["os.system"],
  "import os as o\no.popen(x)": ["os.popen"],
  "from os import system as s\ns(x)": ["os.system"],
  "import subprocess\nsubprocess.run(x, shell=True)": ["shell"],
  "import subprocess\nsubprocess.run(x, shell=y)": ["shell"],
  "import yaml\nyaml.load(x)": ["yaml.load"],
  "from yaml import unsafe_load\nunsafe_load(x)": ["yaml.unsafe_load"],
  "import numpy as np\nnp.load(x, allow_pickle=True)": ["allow_pickle"],
  "import torch\ntorch.load(x)": ["torch.load"],
  "import torch as t\nt.load(x)": ["torch.load"],
  "f(x, trust_remote_code=True)": ["trust_remote_code"],
  "f(x, **{'trust_remote_code': True})": ["trust_remote_code"],
  "import urllib.request": ["urllib"],
  "from urllib import request": ["urllib"],
  "import requests": ["requests"],
  "import httpx": ["httpx"],
  "import socket": ["socket"],
  "import importlib\nimportlib.import_module('pickle')": ["pickle"],
}


@pytest.mark.parametrize("source", SAMPLES)
def test_each_danger_is_noticed(source):
  assert dangers(source) == SAMPLES[source]


@pytest.mark.parametrize(
  "source",
  [
    "import re\nre.compile('x')",
    "lowered.compile()",
    "model.eval()",
    "import numpy as np\nnp.load(x)\nnp.load(x, allow_pickle=False)",
    "import subprocess\nsubprocess.run([x], shell=False)",
    "import yaml\nyaml.safe_load(x)",
    "import json\njson.load(x)",
    "def f(requests): return requests",
    "self.load(x)",
  ],
)
def test_what_is_harmless_is_let_through(source):
  assert dangers(source) == []


def test_nothing_that_is_read_can_run_code():
  files = [p for part in ("rope_jax", "launch", "configs") for p in (ROOT / part).rglob("*.py")]
  found = {str(p.relative_to(ROOT)): dangers(p.read_text()) for p in sorted(files)}
  assert len(found) > 100
  assert {name: what for name, what in found.items() if what} == ALLOWED


IMPORTS = """
import importlib, pkgutil, sys
seen = []
def hook(event, arguments):
  if event in ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "os.system"):
    seen.append((event, repr(arguments)[:200]))
sys.addaudithook(hook)
import rope_jax
names = [m.name for m in pkgutil.walk_packages(rope_jax.__path__, "rope_jax.")]
for name in names:
  if name in sys.argv[1:]:
    continue
  importlib.import_module(name)
assert not seen, seen
print(len(names))
"""
# Need an extra, or are for a process of their own.
_EXTRAS = (
  "rope_jax.bench.peer",
  "rope_jax.bench.worker",
  "rope_jax.evals.harness_model",
  "rope_jax.export.modeling_rope_jax",
)


def test_importing_connects_to_nothing_and_reads_no_pickle():
  command = [sys.executable, "-c", IMPORTS, *_EXTRAS]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > 100
