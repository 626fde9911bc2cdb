"""The rope of a GGUF file, from its metadata and its tensors of factors.

What the numbers mean is what llama.cpp does with them (src/llama-model.cpp, src/llama-context.cpp)
and what its converters write (conversion/base.py, llama.py, phi.py). Where these two disagree, or
a key is not known, the file is refused: a rope that is almost right is the worst kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from rope_jax import rope as rope_lib
from rope_jax.rope import Rope
from rope_jax.weights.gguf_check import Header

TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_SCALING = ("factor", "attn_factor", "original_context_length")
_YARN = ("log_multiplier", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
_KNOWN = (
  *("dimension_count", "freq_base", "scale_linear", "scaling.type", "scaling.finetuned"),
  *(f"scaling.{key}" for key in _SCALING),
  *(f"scaling.yarn_{key}" for key in _YARN),
)


def read(
  header: Header, head_dim: int, context: int, factors: Callable[[str], np.ndarray | None]
) -> Rope:
  """The rope that the model was made with.

  Args:
    header: of the file.
    head_dim: channels of a head.
    context: `{arch}.context_length`, tokens.
    factors: gives one of `TENSORS` as an array [pairs], or None where the file has none.

  Raises:
    ValueError: naming the key that is unknown, missing, or at odds with another.
  """
  return _Reader(header, head_dim, context).rope(*(factors(name) for name in TENSORS))


class _Reader:
  def __init__(self, header: Header, head_dim: int, context: int):
    self.header, self.head_dim, self.context = header, head_dim, context
    self.prefix = f"{header.field('general.architecture')}.rope."
    for key in header.keys:
      if key.startswith(self.prefix) and key.removeprefix(self.prefix) not in _KNOWN:
        raise ValueError(f"{key}: this metadata of the rope is not supported")

  def rope(self, freqs, long, short) -> Rope:
    kind = self.kind(freqs, long, short)
    parameters = getattr(self, f"_{kind}")(freqs, long, short)
    config = dict(
      head_dim=self.head_dim,
      max_position_embeddings=self.context,
      rope_parameters=dict(
        parameters, rope_theta=self.number("freq_base", 10_000.0), **self.partial()
      ),
    )
    original = self.header.field(self.prefix + "scaling.original_context_length")
    if original is not None:
      config["original_max_position_embeddings"] = original
    return rope_lib.from_hf(config)

  def kind(self, freqs, long, short) -> str:
    """'none', 'linear', 'yarn', 'longrope' or 'freqs'."""
    kind = self.header.field(self.prefix + "scaling.type", "none")
    old = self.number("scale_linear", None)
    if kind not in ("none", "linear", "yarn", "longrope"):
      raise ValueError(f"{self.prefix}scaling.type={kind!r}: unknown; none, linear, yarn, longrope")
    if (long is None) != (short is None):
      raise ValueError("of rope_factors_long and rope_factors_short there is only one")
    if kind == "longrope" and long is None:
      raise ValueError(f"{self.prefix}scaling.type='longrope' without tensors of factors")
    if old is not None and old != 1:
      if kind == "yarn" or self.number("scaling.factor", old) != old:
        raise ValueError(f"{self.prefix}scale_linear={old} and {self.prefix}scaling.* disagree")
      kind = "linear"
    if long is not None:  # the converter of Phi-3 writes no type
      if kind not in ("none", "longrope") or freqs is not None:
        raise ValueError(f"rope_factors_long with another scaling ({kind})")
      return "longrope"
    if freqs is not None:
      if kind != "none":
        raise ValueError(f"rope_freqs with {self.prefix}scaling.type={kind!r}")
      return "freqs"
    return kind

  def number(self, key: str, default):
    out = self.header.field(self.prefix + key, default)
    if out is default:
      return out
    if isinstance(out, bool) or not isinstance(out, (int, float)) or not math.isfinite(out):
      raise ValueError(f"{self.prefix}{key}={out!r} must be a number")
    return float(out)

  def only(self, kind: str, *allowed: str) -> None:
    """That no key of another scaling is there which would change the rope."""
    neutral = {
      "factor": (0.0, 1.0),  # llama.cpp: 0 is absent
      "original_context_length": (self.context,),
      "yarn_log_multiplier": (0.0,),
    }
    for key in (*_SCALING, *(f"yarn_{key}" for key in _YARN)):
      value = self.number(f"scaling.{key}", None)
      if value is None or key in allowed or value in neutral.get(key, (1.0,)):
        continue
      raise ValueError(f"{self.prefix}scaling.{key}={value:g} has no meaning for scaling {kind!r}")

  def partial(self) -> dict:
    key = f"{self.prefix}dimension_count"
    count = self.header.field(key, self.head_dim)
    if isinstance(count, bool) or not isinstance(count, int):
      raise ValueError(f"{key}={count!r} must be a whole number")
    if count == self.head_dim:
      return {}
    if not 0 < count < self.head_dim or count % 2:
      raise ValueError(f"{key}={count} must be even and at most the {self.head_dim} channels")
    if self.prefix == "llama.rope.":
      # The order of its rows is that of whole heads.
      raise ValueError(f"{key}={count}: architecture 'llama' rotates all {self.head_dim} channels")
    share = count / self.head_dim
    if int(share * self.head_dim) != count:  # rounded down by a bit
      share = math.nextafter(share, 1.0)
    return dict(partial_rotary_factor=share)

  def _none(self, freqs, long, short) -> dict:
    self.only("none")
    return dict(rope_type="default")

  def _linear(self, freqs, long, short) -> dict:
    self.only("linear", "factor", "original_context_length")
    factor = self.number("scaling.factor", self.number("scale_linear", None))
    if not factor:
      raise ValueError(f"{self.prefix}scaling.factor is missing")
    return dict(rope_type="linear", factor=factor)

  def _freqs(self, freqs, long, short) -> dict:
    """Llama 3.1: theta_i is divided by its factor. Which lengths made the factors is not stored."""
    self.only("none, with rope_freqs", "attn_factor", "original_context_length")
    listed = freqs.astype(np.float64).tolist()
    attention = self.number("scaling.attn_factor", 1.0)
    return dict(
      rope_type="longrope", short_factor=listed, long_factor=listed, attention_factor=attention
    )

  def _longrope(self, freqs, long, short) -> dict:
    self.only("longrope", "attn_factor", "original_context_length")
    original = self.number("scaling.original_context_length", None)
    if original is None or original < 2:
      raise ValueError(f"{self.prefix}scaling.original_context_length={original}: not above 1")
    out = dict(
      rope_type="longrope",
      short_factor=short.astype(np.float64).tolist(),
      long_factor=long.astype(np.float64).tolist(),
    )
    s = self.context / original
    usual = math.sqrt(1 + math.log(s) / math.log(original)) if s > 1 else 1.0
    scale = self.number("scaling.attn_factor", 1.0)
    if f"{self.prefix}scaling.attn_factor" not in self.header.keys and usual != 1:
      # llama.cpp would take 1 here, the model's own code the usual one.
      raise ValueError(f"{self.prefix}scaling.attn_factor is missing")
    # The file has it in single precision; the formula is what the model has.
    return out if math.isclose(scale, usual, rel_tol=1e-6) else dict(out, attention_factor=scale)

  def _yarn(self, freqs, long, short) -> dict:
    factor = self.number("scaling.factor", None)
    original = self.number("scaling.original_context_length", None)
    for key, value in (("factor", factor), ("original_context_length", original)):
      if not value:
        raise ValueError(f"{self.prefix}scaling.{key} is missing")
    if factor < 1:
      raise ValueError(f"{self.prefix}scaling.factor={factor:g} must be at least 1")
    if self.number("scaling.yarn_ext_factor", 1.0) != 1:
      raise ValueError(f"{self.prefix}scaling.yarn_ext_factor: only 1 is supported")
    out = dict(rope_type="yarn", factor=factor)
    for key in ("beta_fast", "beta_slow"):
      value = self.number(f"scaling.yarn_{key}", None)
      if value is not None:
        out[key] = value
    natural = 0.1 * math.log(factor) + 1
    share = self.number("scaling.yarn_log_multiplier", 0.0)
    if share < 0:
      raise ValueError(f"{self.prefix}scaling.yarn_log_multiplier={share:g} must not be negative")
    if share:  # llama.cpp: mscale is 1, this is mscale_all_dim
      out |= dict(mscale=1.0, mscale_all_dim=share)
      natural /= 0.1 * share * math.log(factor) + 1
    # The converter writes the whole scale here, llama.cpp has taken it for a further factor.
    whole = self.number("scaling.yarn_attn_factor", natural)
    if not math.isclose(whole, natural, rel_tol=1e-6):
      raise ValueError(
        f"{self.prefix}scaling.yarn_attn_factor={whole:g} is ambiguous: YaRN's own scale would be "
        f"{natural:g}"
      )
    further = self.number("scaling.attn_factor", 1.0)  # llama.cpp multiplies
    if further != 1:
      out = {k: v for k, v in out.items() if not k.startswith("mscale")}
      out["attention_factor"] = natural * further
    return out
