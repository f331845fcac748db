"""The model that is examined: a converted folder, or a run's best checkpoint as it lies there."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fovlm.checkpoint import store
from fovlm.config.schema import Experiment
from fovlm.data.chat import load_tokenizer
from fovlm.data.dataset import tokenizer_path
from fovlm.errors import UserError
from fovlm.model.build import build
from fovlm.model.modeling import FoveatedConfig, FoveatedVLM
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
        model, tokenizer, experiment = _of_run(folder)
        data = experiment.data
        own = {name: data.sources[name].model_dump() for name in data.val}
    else:
        model, processor = open_model(folder, torch.float32)
        tokenizer = processor.tokenizer
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().contiguous().numpy().tobytes())
    model = model.to(device, dtype).eval().requires_grad_(False)
    return Target(model, tokenizer, folder.resolve().name, digest.hexdigest(), own)


def _of_run(folder: Path) -> tuple[FoveatedVLM, PreTrainedTokenizerBase, Experiment]:
    from fovlm.train.engine import (  # brings deepspeed, which a converted folder does without
        read_weights,
        whole_checkpoint,
    )

    path = whole_checkpoint(folder)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    try:
        experiment = Experiment.parse((path / "experiment.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'experiment.yaml'}: {' '.join(str(error).split())[:160]}") from error
    if (stored := path / store.CONFIG).is_file():
        model = FoveatedVLM(FoveatedConfig(**json.loads(stored.read_text(encoding="utf-8"))))
    else:  # an old checkpoint: the shapes are those of the backbones it started from
        model = build(experiment.model, experiment.data.image_frames)
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: its weights are not those of its model ({' '.join(str(error).split())[:160]})"
        ) from error
    own = run / "tokenizer"
    return model, load_tokenizer(str(own) if own.is_dir() else tokenizer_path(experiment)), experiment
