"""Raw data -> shards of the unified format: sources, planning, the workers, checks, and evaluation sets."""
