"""Mutated flags of the entry points: each string runs, or ends in one line and exit code 2.

  python tests/faults/fuzz_flags.py SEED COUNT

One process takes in what launch/*.py imports, then forks for every command line.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
SECONDS = 20  # of a command line, above which it hangs
FILES = ("quickstart.py", "posgen.py", "smollm2_16k.py:phase=none,rank=0", "search_tiny.py")
VALUES = (
  "",
  "0",
  "1",
  "-1",
  "7",
  "nan",
  "inf",
  "-inf",
  "1e400",
  "1e-46",
  "0x10",
  "1_000",
  "10" * 40,
)
VALUES += (
  "9" * 5000,
  "True",
  "none",
  "None",
  "yarn",
  "no such",
  "a\nb",
  "a\n\nTraceback\nb",
  "żółć",
)
VALUES += (
  "\udc80",
  "()",
  "(",
  ")",
  "(1,)",
  "('q','v')",
  "q,v",
  "('q',1)",
  "((1,2),(3,))",
  "[1",
  "{}",
)
VALUES += (
  "(" * 300,
  "[" * 50_000,
  "{'a': 1}",
  "1,2",
  "(nan,)",
  "1e999,",
  "'",
  '"',
  "\\",
  "b'q'",
  "..",
)
VALUES += (
  "/",
  "~",
  "split:train",
  "tfds:",
  "run:pretrain",
  "64,128",
  "{'a': {}}",
  "-" * 9,
  "=",
  "%s",
)
BLOCKS = (
  "",
  ".",
  ".rope",
  ".train",
  ".runs",
  ".runs.pretrain",
  ".runs.no",
  ".evals",
  ".evals.x",
  ".to_dict",
)
BLOCKS += (".no", ".rope.no", ".rope.theta.x", ".train.steps.x", ".lora.targets[0]", ".order", "..")


# Refused, whatever the seed: of each kind that has once ended in a traceback or in several lines.
QUICK = f"--config={ROOT}/configs/quickstart.py"
KNOWN = (
  [QUICK, "--config.runs.pretrain.train.steps=a\nb"],
  [QUICK, "--config.order[0]=pretrain"],
  [QUICK, "--config=/", "--config.order=x"],
  [f"--config={ROOT}/configs"],
  [QUICK, "stray"],
)


def run(seed: int, count: int) -> dict:
  """Runs `count` command lines in another process.

  Raises:
    AssertionError: with what the first ended in that neither ran nor was refused in one line.
  """
  args = [sys.executable, __file__, str(seed), str(count)]
  env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
  done = subprocess.run(args, capture_output=True, text=True, env=env, timeout=60 + 10 * count)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def command_line(rng, keys: dict) -> list[str]:
  """One to three flags of a config file, of keys that are there or not."""
  file = list(keys)[rng.integers(len(keys))]
  out = [f"--config={ROOT}/configs/{file}"]
  for _ in range(rng.integers(1, 4)):
    names = [f".{key}" for key in keys[file]] if rng.random() < 0.9 else BLOCKS
    flag = f"config{names[rng.integers(len(names))]}"
    value = VALUES[rng.integers(len(VALUES))]
    if flag[7:] in keys[file] and rng.random() < 0.4:
      value = str(keys[file][flag[7:]])
    form = rng.random()
    if form < 0.9:
      out.append(f"--{flag}={value}")
    else:
      out += (
        [f"--no{flag}"] if form < 0.94 else [f"--{flag}"] if form < 0.97 else [f"--{flag}", value]
      )
  return out


def outcome(args: list[str]) -> tuple[int, str]:
  """(exit code, what is on stderr) of a command line, in a fork of this process."""
  import cli

  def main(c, _):
    cli.validated_runs(c, "cpu")

  with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as errors:
    child = os.fork()
    if not child:
      os.dup2(errors.fileno(), 2)
      signal.alarm(SECONDS)
      sys.argv = ["train.py", *args]
      code = 1
      try:
        cli.run(main)
      except SystemExit as ended:
        code = ended.code or 0
      except BaseException:
        import traceback

        traceback.print_exc()
      finally:
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    errors.seek(0)
    return os.waitstatus_to_exitcode(status), errors.read()


def main(seed: int, count: int) -> None:
  """Prints how many command lines there were, and how many were refused; fails at another end."""
  sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests"), str(Path(__file__).parent)]
  from mutations import leaves
  from starts import load

  keys = {
    file: {key: block[key.rpartition(".")[2]] for key, block in leaves(load(file))}
    for file in FILES
  }
  refused = 0
  for args in KNOWN:
    code, errors = outcome(args)
    assert code == 2 and len(errors.splitlines()) == 1, (
      f"{args!r} ended with {code}: {errors[-2000:]}"
    )
  for number in range(count):
    args = command_line(np.random.default_rng([seed, number]), keys)
    code, errors = outcome(args)
    lines = errors.strip().splitlines()
    good = code == 0 or code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert good, f"flags {seed} {number}: {args!r} ended with {code}: {errors[-2000:]}"
    refused += code == 2
  print(json.dumps(dict(flags=count, flags_refused=refused)))


if __name__ == "__main__":
  main(*map(int, sys.argv[1:3]))
