"""The algebra: a method is a frequency transform `Rope -> Rope`, plus an optional learned phase.

    from rope_jax import rope
    r = rope.base(head_dim=128, theta=1e4, original_context=4096)
    r = rope.yarn(r, factor=16)
    cos, sin = rope.cos_sin(r, positions)
    q = rope.rotate(q, cos, sin)

Pure functions on arrays: no Flax, no configuration, no files.
"""

from rope_jax.rope.phase import psc, psc_gate, psc_init, psc_parameter_count
from rope_jax.rope.resonance import resonance
from rope_jax.rope.rotary import Rope, base, cos_sin, rotate
from rope_jax.rope.scaling import (
  SCALINGS,
  dynamic_ntk,
  llama3,
  none,
  ntk,
  ntk_by_parts,
  pi,
  yarn,
)

__all__ = [
  "SCALINGS",
  "Rope",
  "base",
  "cos_sin",
  "dynamic_ntk",
  "llama3",
  "none",
  "ntk",
  "ntk_by_parts",
  "pi",
  "psc",
  "psc_gate",
  "psc_init",
  "psc_parameter_count",
  "resonance",
  "rotate",
  "yarn",
]
