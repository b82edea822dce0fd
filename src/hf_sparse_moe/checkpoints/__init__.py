"""Checkpoints on disk and on the Hub: reading sources, writing shards, one atomic folder."""
