"""The entry point of lmms-eval: says where the model is, without heavy imports."""

from typing import Any


def manifest() -> Any:
    """Called by lmms-eval: the module of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fovlm", simple_class_path="fovlm.eval.lmms_eval.Fovlm")
