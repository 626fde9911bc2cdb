"""Text to batches: corpora, tokenizers, token caches, packing."""
