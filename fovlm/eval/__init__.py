"""Evaluation: benchmarks and prepared shards, scored by likelihood, with controls."""
