"""A video language model that spends one token on each frame and decides where to look.

The packages in reading order; each imports only from those above it:

    errors, paths, fileio     user errors, folders, atomic files; also redact, tables, progress, distributed
    config/                   settings of an experiment: YAML files, schema, the DeepSpeed JSON
    media/                    decode pictures and videos, tolerantly for users; encode
    data/                     tar shard -> index -> order -> sample -> pack -> batch; the synthetic task
    launch/                   starts the ranks of a run: one machine, several nodes, SLURM
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

`import fovlm` imports neither transformers nor torch, so the command line, settings and data preparation start fast.
It registers the model with transformers' Auto classes, at once or as soon as the program imports them.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
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


class _RegisterLater:
    """An import hook: once the program has imported transformers, the model is registered with its Auto classes.

    transformers has no lazy entry for a class, and registering at once would import torch (2 to 4 s). Where a module
    of fovlm imports transformers nothing is registered: that module needs no Auto class and is half imported then.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "transformers" or _called_by_fovlm():
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module("fovlm.model.processing")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _called_by_fovlm() -> bool:
    frame = sys._getframe(2)
    while frame and not frame.f_globals.get("__name__", "").startswith("fovlm."):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


if "transformers" in sys.modules:
    import_module("fovlm.model.processing")
else:
    sys.meta_path.insert(0, _RegisterLater())
