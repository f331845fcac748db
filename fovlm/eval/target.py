"""The model that is examined: a converted folder, or a run's best checkpoint as it lies there."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fovlm.checkpoint.locate import open_run
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import open_model
from fovlm.paths import run_root


@dataclass
class Target:
    """A model ready to be asked. `own` are a run's validation sources, by name."""

    model: FoveatedVLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights: str  # a digest of all of them
    own: dict[str, dict[str, Any]]


def open_target(where: str, device: torch.device | str = "cpu") -> Target:
    """The model of a folder that `fovlm convert` made, or of a run (folder or name). Raises UserError.

    On a CPU it computes in fp32 whatever its weights are stored as; on a GPU in bf16.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    folder = next((f for f in (Path(where), run_root() / where) if f.is_dir()), Path(where))
    own: dict[str, dict[str, Any]] = {}
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        saved = open_run(folder)
        model, tokenizer = FoveatedVLM(saved.model_config()), saved.tokenizer()
        saved.load_into(model)
        own = {name: saved.experiment.data.sources[name].model_dump() for name in saved.experiment.data.val}
    else:
        model, processor = open_model(folder, torch.float32)
        tokenizer = processor.tokenizer
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().contiguous().numpy().tobytes())
    model = model.to(device, dtype).eval().requires_grad_(False)
    return Target(model, tokenizer, folder.resolve().name, digest.hexdigest(), own)
