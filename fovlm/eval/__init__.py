"""Exams: published benchmarks and prepared shards, scored by likelihood, with the controls that keep one honest."""
