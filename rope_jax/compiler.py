"""How programs are compiled: options for the machine at hand, and what is kept between starts."""

from __future__ import annotations

import hashlib
import os
import platform

import jax

# XLA for CPU takes half of a 512-bit vector unit unless told otherwise; where there is none, it
# changes nothing. Programs for other devices ignore it.
_OPTIONS = dict(xla_cpu_prefer_vector_width=512)


def jit(function, **kwargs):
  """`jax.jit` with our compiler options; only for programs that are called from outside of others."""
  return jax.jit(function, compiler_options=_OPTIONS, **kwargs)


def keep_programs() -> None:
  """Compiled programs are kept on the disk, and found again by the next process.

  In JAX_COMPILATION_CACHE_DIR, by default ~/.cache/rope_jax/programs; JAX_ENABLE_COMPILATION_CACHE=
  false switches it off. To be called before anything compiles.
  """
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    # Programs for a CPU are made of its instructions, and a home may be shared by many machines.
    path = os.path.join(home, "rope_jax", "programs", _machine())
    jax.config.update("jax_compilation_cache_dir", path)


def _machine() -> str:
  """A name for machines that have the same instructions."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      features = next((line for line in f if line.startswith(("flags", "Features"))), "")
  except OSError:
    features = platform.processor()
  return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
