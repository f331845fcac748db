"""What lmms-eval's entry point loads: a few words about where the model is, and nothing heavy."""

from typing import Any


def manifest() -> Any:
    """The description of our model in lmms-eval's own terms; called by lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fovlm", simple_class_path="fovlm.eval.lmms_eval.Fovlm")
