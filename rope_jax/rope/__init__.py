"""The algebra: a method is a frequency transform `Rope -> Rope`, plus an optional learned phase.

    from rope_jax import rope
    r = rope.base(head_dim=128, theta=1e4, original_context=4096)
    r = rope.yarn(r, factor=16)
    cos, sin = rope.cos_sin(r, positions)
    q = rope.rotate(q, cos, sin)

Pure functions on arrays: no Flax, no configuration, no files. Frequencies with parameters fit the
same hook: FoPE carries its frozen mix in the rope, CLEX corrects a rope inside the model. What does
not fit changes attention itself (Self-Extend, ReRoPE, dual chunk attention) or the magnitude by
position (xPos), and is not here.
"""

from rope_jax.rope.disturbance import angle_histogram, disturbance, dprope
from rope_jax.rope.hf import depends_on_length, from_hf, to_hf
from rope_jax.rope.learned import clex, clex_correct, clex_init, fope
from rope_jax.rope.longrope import dynamic_longrope, longrope, longrope2
from rope_jax.rope.methods import SCALINGS
from rope_jax.rope.phase import psc, psc_gate, psc_init, psc_parameter_count, psc_rotation
from rope_jax.rope.resonance import common_period, critical_pair, feature_gap, resonance
from rope_jax.rope.rotary import Rope, base, cos_sin, per_layer, rebase, stack
from rope_jax.rope.rotation import by_channel, rotate, rotate_channels
from rope_jax.rope.scaling import (
  dynamic_ntk,
  dynamic_yarn,
  llama3,
  none,
  ntk,
  ntk_by_parts,
  ntk_by_parts_v1,
  ntk_critical,
  ntk_mixed,
  pi,
  yarn,
)
from rope_jax.rope.shaping import abf, cope, drope, hope, power, proportional, truncated

__all__ = [
  "SCALINGS",
  "Rope",
  "abf",
  "angle_histogram",
  "base",
  "by_channel",
  "clex",
  "clex_correct",
  "clex_init",
  "common_period",
  "cope",
  "cos_sin",
  "critical_pair",
  "disturbance",
  "dprope",
  "drope",
  "dynamic_longrope",
  "dynamic_ntk",
  "dynamic_yarn",
  "feature_gap",
  "fope",
  "depends_on_length",
  "from_hf",
  "hope",
  "llama3",
  "longrope",
  "longrope2",
  "none",
  "ntk",
  "ntk_by_parts",
  "ntk_by_parts_v1",
  "ntk_critical",
  "ntk_mixed",
  "per_layer",
  "pi",
  "power",
  "proportional",
  "psc",
  "psc_gate",
  "psc_init",
  "psc_parameter_count",
  "psc_rotation",
  "rebase",
  "resonance",
  "rotate",
  "rotate_channels",
  "stack",
  "to_hf",
  "truncated",
  "yarn",
]
