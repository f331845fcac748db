"""A video language model that spends one token on each frame, and decides itself where to look."""

from typing import Any

__version__ = "0.2.0"

# Where the names of the ordinary interface live. They are imported when asked for, and with them torch; until then
# everything that does without it stays light.
PUBLIC = {
    "FoveatedConfig": "model",
    "FoveatedVLM": "model",
    "FoveatedProcessor": "processor",
    "open_model": "processor",
}
__all__ = [*PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """`from fovlm import FoveatedVLM` also tells transformers' Auto classes about it."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'fovlm' has no attribute '{name}'")
    from importlib import import_module

    import_module("fovlm.processor")
    return getattr(import_module(f"fovlm.{PUBLIC[name]}"), name)
