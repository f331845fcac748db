"""The type that a run computes in: what `train.precision: auto` means on this machine."""

from pathlib import Path

import torch

from fovlm.config import deepspeed
from fovlm.config.existing_run import recorded, settled
from fovlm.config.schema import Experiment
from fovlm.model.processing import cpu_has_bf16
from fovlm.paths import run_root


def settle(experiment: Experiment, device: str) -> Experiment:
    """The experiment with `train.precision: auto` replaced: by that of the run that it resumes, or else by bf16 where
    `device` ("cuda" or "cpu") multiplies in it, fp32 elsewhere and on a CPU for small models."""
    wanted = experiment.train.resume
    folders = [experiment.run_folder] if wanted in ("auto", "none") else [Path(wanted), run_root() / wanted]
    made = next((e for folder in folders if (e := recorded(folder))), None) if wanted != "none" else None
    if made:
        return settled(experiment, made.train.precision)
    enabled = deepspeed.read(experiment.deepspeed).get("bf16", {}).get("enabled")
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # small models made from a configuration gain nothing, and stay the same on every machine
        native = isinstance(experiment.model.llm, str) and cpu_has_bf16()
    return settled(experiment, "bf16" if enabled and native else "fp32")
