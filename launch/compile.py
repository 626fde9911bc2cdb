"""Compiles the training step for a TPU slice that need not exist: does it fit, how fast can it be.

  python launch/compile.py --config=configs/psc_64k.py --topology=v5p:4x4x4
  python launch/compile.py --config=configs/psc_64k.py --topology=v5e:16x16 --mesh=fsdp=8,context=32
  python launch/compile.py --config=configs/psc_64k.py --topology=v5p:4x4x4 --sweep

The compiler is the real one, of `pip install -e .[tpu]`, on any machine; no weights are read. It
prints a table and writes WORKDIR/compile.json. --sweep tries meshes and what is kept for the
backward pass, and recommends the fastest that fits; its results go to WORKDIR/sweep.jsonl, so that
the same command goes on where it was cut off. docs/pods.md says what the numbers are.
"""

import itertools
import json
import os
import time
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is for TPU, this process is not
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # programs for devices that are not here
for name, value in dict(
  TPU_SKIP_MDS_QUERY="1",  # do not ask what machine this is
  TPU_WORKER_HOSTNAMES="localhost",  # nor complain that nobody answers
  TPU_ACCELERATOR_TYPE="v5p-8",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  TPU_MIN_LOG_LEVEL="3",
  TPU_STDERR_LOG_LEVEL="3",
).items():
  os.environ.setdefault(name, value)

import cli  # noqa: E402 - the environment comes first
from absl import flags  # noqa: E402

TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, e.g. v5p:4x4x4, v5e:16x16.")
MESH = flags.DEFINE_string(
  "mesh", "", "Axes that replace those of the config: fsdp=16,context=4, or 1x16x4x1."
)
SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes and config.model.remat.")
REMAT = flags.DEFINE_list(
  "sweep_remat",
  ["full", "attention", "qkv", "matmuls"],
  "With --sweep: policies to try, frugal ones first.",
)
ACCUMULATION = flags.DEFINE_list(
  "sweep_accumulation", [], "With --sweep: micro-batches to try; the config's if none."
)
TENSOR = flags.DEFINE_list("sweep_tensor", ["1"], "With --sweep: sizes of the tensor axis to try.")
cli.need("config", "configs/psc_64k.py")
cli.need("topology", "v5p:4x4x4")
workdir_of = cli.define_workdir()


def main(c, config_name):
  workdir = workdir_of(config_name)
  # A run that is evaluated as it is has no step.
  runs = {name: run for name, run in cli.runs_of(c).items() if run.train.steps}
  if not runs:
    cli.fail("config.train.steps=0: there is no training step to compile")
  for run in runs.values():
    _set_mesh(run)
  runs = cli.validated_runs(c, "tpu", runs)

  from rope_jax import config, report
  from rope_jax.search import settings
  from rope_jax.train import ahead

  # Factors that are still to be found take as much memory as any others.
  runs = {name: settings.placeholder(run) for name, run in runs.items()}

  try:
    tpu = ahead.tpu_slice(TOPOLOGY.value)
  except ValueError as error:
    cli.fail(error)
  results = {}
  for name, run in runs.items():
    if name:
      print(f"\n== {name}")
    if SWEEP.value:
      cli.checked(name, _sweep, run, tpu, os.path.join(cli.directory(workdir, name), "sweep.jsonl"))
    else:
      results[name] = cli.checked(name, ahead.report, run, tpu)
      print(report.compiled(results[name]), flush=True)
  if results:
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "compile.json")
    config.write_json(path, results.get("", results))
    print(path)


def _set_mesh(run) -> None:
  """Replaces axes of config.mesh by those of --mesh."""
  if not MESH.value:
    return
  axes = ("data", "fsdp", "context", "tensor")
  try:
    if "=" in MESH.value:
      sizes = {key: int(size) for key, size in (x.split("=") for x in MESH.value.split(","))}
    else:
      sizes = dict(zip(axes, map(int, MESH.value.split("x")), strict=True))
    run.mesh.update(sizes)
  except (ValueError, KeyError):
    expected = f"sizes of {', '.join(axes)}: fsdp=16,context=4 or 1x16x4x1"
    cli.fail(f"--mesh={MESH.value}: expected {expected}")


def _sweep(run, tpu, path: str) -> None:
  """Compiles the candidates, writing each result at once, and says which is the fastest."""
  from rope_jax import validate
  from rope_jax.model.config import REMAT as policies
  from rope_jax.train import ahead

  if "splash" not in run.model.attention:
    raise ValueError(
      f"config.model.attention={run.model.attention!r}: --sweep compares times, which are only "
      "known for 'splash'"
    )
  unknown = set(REMAT.value) - set(policies)
  if unknown:
    cli.fail(f"--sweep_remat={','.join(REMAT.value)}: expected some of {', '.join(policies)}")
  groups = ahead.candidates(
    run,
    tpu,
    remat=REMAT.value,
    accumulation=_numbers("sweep_accumulation", ACCUMULATION.value) or [run.train.accumulation],
    tensor=_numbers("sweep_tensor", TENSOR.value),
  )
  for candidate in itertools.chain(*groups):
    validate.validate(candidate, "tpu", inputs=False)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  done = _read(path)
  total, began, compiled = sum(map(len, groups)), time.monotonic(), 0
  rows, number = [], 0
  for group in groups:
    fits = True
    for candidate in group:
      number += 1
      if not fits:
        continue  # the next policies keep more
      key = f"{tpu.name} {_versions()} {candidate.to_json()}"
      if key not in done:
        done[key] = dict(ahead.report(candidate, tpu), key=key)
        with open(path, "a") as f:
          f.write(json.dumps(done[key]) + "\n")
        compiled += 1
      row, fits = done[key], done[key]["fits"]
      rows.append(row)
      left = (time.monotonic() - began) / max(compiled, 1) * (total - number)
      print(f"[{number}/{total}] {_line(row)}  (at most {left / 60:.0f} min left)", flush=True)
  fitting = [row for row in rows if row["fits"]]
  if not fitting:
    print("nothing fits; try more micro-batches, --sweep_accumulation=2,4, or a larger slice")
    return
  best = min(fitting, key=lambda row: (row["step_seconds"], row["bytes"]["total"]))
  print(f"\nfastest that fits:\n{_line(best)}")
  flags = [f"--config.mesh.{axis}={size}" for axis, size in best["mesh"].items()]
  flags += [f"--config.model.remat={best['remat']}"]
  flags += [f"--config.train.accumulation={best['batch']['accumulation']}"]
  print(" ".join(flags))


def _numbers(name: str, values: list[str]) -> list[int]:
  if not all(value.isdigit() and int(value) for value in values):
    cli.fail(f"--{name}={','.join(values)}: expected whole numbers above 0, e.g. 1,2,4")
  return [int(value) for value in values]


def _versions() -> str:
  """Of all that a result depends on besides the config."""
  return " ".join(f"{name} {metadata.version(name)}" for name in ("rope-jax", "jax", "libtpu"))


def _read(path: str) -> dict:
  """Results of a sweep by key; a line that a kill has cut is taken out."""
  from rope_jax import reading

  if not os.path.lexists(path):
    return {}
  text = reading.read_text(path)
  *lines, rest = text.split("\n")
  try:
    found = {row["key"]: row for row in map(reading.parse, lines)}
  except (KeyError, TypeError, ValueError) as error:
    cli.fail(reading.refusal(path, f"no results of a sweep: {error}"))
  if rest:
    with open(path + ".tmp", "w") as f:
      f.write(text.removesuffix(rest))
    os.replace(path + ".tmp", path)
  return found


def _line(row: dict) -> str:
  mesh = "x".join(map(str, row["mesh"].values()))
  line = f"{mesh:>10}  accumulation {row['batch']['accumulation']}  remat {row['remat']:<9}"
  if "bytes" not in row:
    return f"{line}  does not fit: {row['error']}"
  line += f"  {row['bytes']['total'] / 1e9:6.1f} of {row['hbm'] / 1e9:.1f} GB"
  line += f"  {row['step_seconds']:6.2f} s ({row['bound']})  MFU {row['mfu']:.0%}"
  return line + ("" if row["fits"] else "  does not fit")


if __name__ == "__main__":
  cli.run(main)
