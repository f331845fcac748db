"""Raw data -> shards: sources, shard plans, workers, checks, repairs and evaluation sets."""
