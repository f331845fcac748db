"""Settings of an experiment: files, schema, and the DeepSpeed JSON."""
