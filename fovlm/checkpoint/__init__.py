"""Saved states: writing, finding, reading, converting.

Loading a checkpoint takes three steps: `locate` finds it by a run's name or folder, `store` checks its files against
their checksums, and `zero_reader` reads the weights without DeepSpeed. A run resumes through `fovlm.train.resume`.
"""
