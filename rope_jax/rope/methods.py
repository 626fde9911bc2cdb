"""Every frequency transform by the name that `config.rope.scaling` knows it by."""

from __future__ import annotations

from collections.abc import Callable

from rope_jax.rope import scaling, shaping
from rope_jax.rope.disturbance import dprope
from rope_jax.rope.learned import clex, fope
from rope_jax.rope.longrope import dynamic_longrope, longrope, longrope2
from rope_jax.rope.rotary import Rope

# name -> function (rope, [factor], *, [seq_len], [kv_heads], options) -> Rope. A method of your own
# is one more entry: SCALINGS["mine"] = mine, before config.base() is called.
SCALINGS: dict[str, Callable[..., Rope]] = dict(
  none=scaling.none,
  pi=scaling.pi,
  ntk=scaling.ntk,
  ntk_critical=scaling.ntk_critical,
  ntk_mixed=scaling.ntk_mixed,
  ntk_by_parts=scaling.ntk_by_parts,
  ntk_by_parts_v1=scaling.ntk_by_parts_v1,
  yarn=scaling.yarn,
  llama3=scaling.llama3,
  dynamic_ntk=scaling.dynamic_ntk,
  dynamic_yarn=scaling.dynamic_yarn,
  longrope=longrope,
  longrope2=longrope2,
  dynamic_longrope=dynamic_longrope,
  dprope=dprope,
  abf=shaping.abf,
  power=shaping.power,
  truncated=shaping.truncated,
  proportional=shaping.proportional,
  cope=shaping.cope,
  hope=shaping.hope,
  drope=shaping.drope,
  fope=fope,
  clex=clex,
)
