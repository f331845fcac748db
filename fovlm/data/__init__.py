"""From tar shards to packed batches."""
