"""Text to batches: corpora, tokenizers, token caches, packing."""

# config.data.positions; rope_jax/rope/positions.py says what they are.
POSITIONS = ("sequential", "pose", "e2_llm", "randomised", "clex", "mixed")
