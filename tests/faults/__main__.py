"""Faults at length: what the tests in this directory do briefly, for as long as one likes.

  python tests/faults kill_train --count=20 --seed=7

Each command prints its figures as a line of JSON, and fails as its test does. docs/reliability.md
has those of the last long run.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

# command -> module:function of (seed, count), which returns figures
COMMANDS = dict(
  kill_train="kills:train",
  kill_search="kills:search",
  kill_evaluation="kills:evaluation",
  configs="fuzz_configs:run",
  files="fuzz_files:run",
  texts="fuzz_texts:run",
  angles="angles:run",
)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("command", choices=COMMANDS)
  parser.add_argument("--count", type=int, required=True, help="kills, configs, files, ...")
  parser.add_argument("--seed", type=int, default=0)
  asked = parser.parse_args()
  import conftest  # noqa: F401 - eight devices

  module, function = COMMANDS[asked.command].split(":")
  start = time.perf_counter()
  figures = getattr(importlib.import_module(module), function)(asked.seed, asked.count)
  seconds = round(time.perf_counter() - start)
  print(json.dumps(vars(asked) | figures | dict(seconds=seconds)))


if __name__ == "__main__":
  main()
