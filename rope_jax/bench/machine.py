"""What a measurement depends on besides its specification: the machine, and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata

import rope_jax

_OURS = ("jax", "jaxlib", "flax", "optax", "numpy")
PEER = ("torch", "transformers", "accelerate", "peft")


def machine() -> dict:
  """Name of the CPU, cores that this process may use, bytes of memory."""
  if hasattr(os, "sched_getaffinity"):
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count()
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return dict(cpu=_cpu(), cores=cores, memory_bytes=memory)


def versions(side: str) -> dict:
  """Versions of what a side runs on.

  Raises:
    metadata.PackageNotFoundError: if one is not installed.
  """
  names = _OURS if side == "ours" else PEER
  out = dict(python=platform.python_version())
  if side == "ours":
    out["rope_jax"] = rope_jax.__version__
  return out | {name: metadata.version(name) for name in names}


def _cpu() -> str:
  if platform.system() == "Darwin":
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  try:
    with open("/proc/cpuinfo") as f:
      names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
  except OSError:
    names = []
  return names[0] if names else platform.processor() or platform.machine()
