"""A video language model that spends one token on each frame and decides where to look.

The packages in reading order; each imports only from those above it:

    errors, paths, fileio     user errors, folders, atomic files; also redact, tables, progress, distributed
    config/                   settings of an experiment: YAML files, schema, the DeepSpeed JSON
    launch                    starts the ranks of a run: one machine, several nodes, SLURM
    media/                    decode pictures and videos, tolerantly for users; encode
    data/                     tar shard -> index -> order -> sample -> pack -> batch; the synthetic task
    model/                    encoder, looks, language model; streaming and generation
    estimate/                 parameters, FLOPs and memory of a run before it starts
    checkpoint/               save, find, read, convert and verify trained states
    viz/                      where the model looks: heat maps, pages, videos, the demo
    train/                    the training loop, DeepSpeed engine, validation, logger
    eval/                     benchmarks and controls, scored by likelihood
    sweep/                    many runs: select, run, watch, tabulate
    prepare/                  raw data sets -> shards; checks and repairs
    report/                   run folders -> comparisons, scaling laws, figures, one page
    cli/                      the command `fovlm`
    kernels (beside fovlm)    Triton kernels of the looks

Importing a public name registers the model with transformers' Auto classes, and so does `import fovlm` where
transformers is imported already. Otherwise `import fovlm` imports neither transformers nor torch: the command line,
settings and data preparation start fast.
"""

import sys
from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Public names and their modules, imported on first use.
PUBLIC = {
    "FoveatedConfig": "model.configuration",
    "FoveatedVLM": "model.modeling",
    "FoveatedProcessor": "model.processing",
    "open_model": "model.processing",
}
__all__ = [*PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fovlm' has no attribute '{name}'")
    import_module("fovlm.model.processing")  # registers all of them
    return getattr(import_module(f"fovlm.{PUBLIC[name]}"), name)


if "transformers" in sys.modules:
    import_module("fovlm.model.processing")
