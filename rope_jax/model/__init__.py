"""The Llama family in Flax Linen."""
