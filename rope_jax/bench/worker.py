"""One measurement: its specification is the argument, its result the last line, both JSON."""

import time

BEGAN = time.perf_counter()

import importlib  # noqa: E402 - the clock comes first
import json  # noqa: E402
import sys  # noqa: E402

from rope_jax.bench import clock  # noqa: E402


def measure(spec: dict) -> dict:
  """The result of a specification (see `bench.plan`), in this process."""
  side = importlib.import_module(f"rope_jax.bench.{spec['side']}")
  imported = time.perf_counter() - BEGAN
  result = side.MEASURES[spec["part"]](spec)
  whole = time.perf_counter() - BEGAN
  seconds = dict(import_seconds=imported, process_seconds=whole)
  return dict(result, **seconds, peak_bytes=clock.peak_bytes())


if __name__ == "__main__":
  print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
