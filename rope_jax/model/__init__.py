"""The Llama family in Flax Linen."""

from rope_jax.model.llama import Llama, ModelConfig, unembedding

__all__ = ["Llama", "ModelConfig", "unembedding"]
