"""How our programs are compiled."""

from __future__ import annotations

import jax

# XLA for CPU takes half of a 512-bit vector unit unless told otherwise, and exponentials twice as
# long. Where there is no such unit, and for other devices, it changes nothing.
_OPTIONS = dict(xla_cpu_prefer_vector_width=512)


def jit(function, **kwargs):
  """`jax.jit` with our compiler options, for programs that nothing jitted calls."""
  return jax.jit(function, compiler_options=_OPTIONS, **kwargs)
