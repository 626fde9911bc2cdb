"""rope_jax: context-window extension of rotary (RoPE) language models in JAX."""

__version__ = "0.1.0"
