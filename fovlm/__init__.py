"""A video language model that spends one token on each frame, and decides itself where to look.

Importing a public name registers the model with transformers' Auto classes. So does `import fovlm` alone where
transformers is imported already. Where transformers comes later it cannot: registering needs transformers and torch,
and what does without them (the command line, settings, data preparation) must start fast.
"""

import sys
from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Where the public names live: imported when asked for.
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
