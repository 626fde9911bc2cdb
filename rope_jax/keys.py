"""Prints the keys of a config, their defaults, and what the source says of each.

  python -m rope_jax.keys              # all
  python -m rope_jax.keys train.       # those that begin so; or several such
  python -m rope_jax.keys rope.yarn    # the options of a method
  python -m rope_jax.keys evals.       # what evaluations take: config.evals.NAME.KEY

Nothing is documented here: the comments of rope_jax/config.py and rope_jax/evals/entries.py, and
the docstrings of methods and searches, are read.
"""

from __future__ import annotations

import ast
import inspect
import io
import operator
import os
import re
import sys
import textwrap
import tokenize

from ml_collections import ConfigDict

from rope_jax import config, rope, search
from rope_jax.evals import entries

_INDENT = dict(initial_indent="    ", subsequent_indent="    ")


def comments(function) -> dict[str, str]:
  """{key: comment} of assignments to `c.key` in a function: above them, then beside them."""
  source = textwrap.dedent(inspect.getsource(function))
  tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline)]
  notes = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
  alone = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip()[0] == "#"}
  found = {}
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("c."):
      first = node.lineno
      while first - 1 in alone:
        first -= 1
      lines = [notes[i] for i in (*range(first, node.lineno), node.end_lineno) if i in notes]
      found[ast.unparse(node.targets[0]).removeprefix("c.")] = " ".join(lines)
  return found


def attributes(documented) -> dict[str, str]:
  """{name: text} of the Args or Attributes in a docstring, those of base classes included."""
  found = {}
  for of in reversed(inspect.getmro(documented)) if inspect.isclass(documented) else [documented]:
    text = inspect.cleandoc(of.__doc__ or "")
    for names, what in re.findall(r"^  (\w[\w, ]*): (.+(?:\n    .+)*)", text, re.M):
      found |= dict.fromkeys(names.split(", "), " ".join(what.split()))
  return found


def options(method) -> dict[str, str]:
  """{option: text} of a method; where that is 'as in `another`', what is said there."""
  found = attributes(method)
  for key, text in found.items():
    if other := re.fullmatch(r"as in `(\w+)`\.?", text):
      found[key] = options(getattr(rope, other[1]))[key]
  whole = re.search(r"options as in `(\w+)`", method.__doc__)
  return (options(getattr(rope, whole[1])) if whole else {}) | found


def documented() -> dict[str, tuple]:
  """{key: (default, text)} of all keys, in alphabetical order."""
  text = comments(config.base)
  for block, methods in (("rope", rope.SCALINGS), ("search", search.METHODS)):
    for name, method in methods.items():
      text = {f"{block}.{name}.{k}": v for k, v in options(method).items()} | text
  values = config.base()
  for name, entry in entries.ENTRIES.items():
    values.evals[name] = entry()
  for block in [*(f"evals.{name}" for name in entries.ENTRIES), "search.fitness"]:
    entry = entries.ENTRIES[operator.attrgetter(block)(values).type]
    own = comments(entries._entry) | comments(entry) | {"type": text.get(block, "")}
    text |= {f"{block}.{k}": v for k, v in own.items()}
  return {key: (value, text.get(key, "")) for key, value in _leaves(values)}


def _leaves(c: ConfigDict, prefix: str = ""):
  for key in c:
    if isinstance(c[key], ConfigDict):
      yield from _leaves(c[key], f"{prefix}{key}.")
    else:
      yield prefix + key, c[key]


def main(argv: list[str]) -> None:
  prefixes = [arg.removeprefix("--").removeprefix("config.") for arg in argv or [""]]
  found = {k: v for k, v in documented().items() if k.startswith(tuple(prefixes))}
  for prefix in prefixes:
    if not any(k.startswith(prefix) for k in found):
      sys.exit(f"error: no key begins with {prefix!r}; python -m rope_jax.keys has them all")
  try:
    for key, (value, text) in found.items():
      print("\n".join([f"{key} = {value!r}", *textwrap.wrap(text, 100, **_INDENT)]), flush=True)
  except BrokenPipeError:  # piped into head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
  main(sys.argv[1:])
