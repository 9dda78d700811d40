"""Embeddings: one shard through decoder and encoders, and the files that hold what became of each row."""
