"""The model to evaluate: a converted folder, or the best checkpoint of a run."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fovlm.checkpoint.locate import find_folder, open_run
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import open_model


@dataclass
class Target:
    """A model to evaluate. `val_sources` are a run's validation sources by name."""

    model: FoveatedVLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights: str  # digest of all weights
    val_sources: dict[str, dict[str, Any]]


def open_target(where: str, device: torch.device | str = "cpu") -> Target:
    """Open a folder that `fovlm convert` made, or a run (folder or name). Raises UserError.

    The model computes in fp32 on a CPU and in bf16 on a GPU, whatever the stored type.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    folder, val_sources = find_folder(Path(where)), {}
    if (folder / "config.json").is_file():
        model, processor = open_model(folder, torch.float32)
        tokenizer = processor.tokenizer
    else:
        saved = open_run(folder)
        model, tokenizer, data = saved.model(), saved.tokenizer(), saved.experiment.data
        val_sources = {name: data.sources[name].model_dump() for name in data.val}
    hashed = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        hashed.update(name.encode() + weight.detach().float().contiguous().numpy().tobytes())
    model = model.to(device, dtype).eval().requires_grad_(False)
    return Target(model, tokenizer, folder.resolve().name, hashed.hexdigest(), val_sources)
