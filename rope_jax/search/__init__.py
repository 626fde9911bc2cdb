"""Search for the rescale factors of LongRoPE: evolution as published, and descent by gradient.

Frequencies are an argument of the compiled forward pass, so that a whole search compiles it once
and a batch of candidates goes through it together. Every search is a function of its options, its
seed and the fitness alone; `config.search` names one of METHODS, and launch/search.py runs it.

A method of your own is a frozen dataclass with defaults (its options in the config), and with
`check`, `budget` and `search` as in `evolution.Evolution`: METHODS["mine"] = Mine, before
config.base() is called.
"""

from rope_jax.search import longrope, longrope2
from rope_jax.search.candidate import Candidate, Space
from rope_jax.search.evolution import Evolution
from rope_jax.search.gradient import Gradient

# config.search.method -> its class.
METHODS: dict[str, type] = dict(
  longrope=longrope.LongRoPE,
  longrope_released=longrope.Released,
  longrope_pieces=longrope.Pieces,
  longrope2=longrope2.LongRoPE2,
  longrope2_released=longrope2.Released,
  gradient=Gradient,
)

__all__ = ["METHODS", "Candidate", "Evolution", "Gradient", "Space"]
