"""A tiny model trained for some steps with the references and with the kernels: two curves as JSON.

Triton's interpreter must be chosen before Triton is imported, with TRITON_INTERPRET=1.
"""

import functools
import json

import torch

import fovlm.model.encoder
from fovlm.data.packing import Batch, PackSize
from fovlm.model.modeling import FoveatedVLM
from fovlm.train.losses import text_loss
from helpers.models import pack, sample, tiny_model

OPERATIONS = {name: getattr(fovlm.model.encoder, name) for name in ("query_attention", "absorbed_attention")}


def use(implementation: str) -> None:
    """Every look from now on: "triton" or "reference"."""
    for name, operation in OPERATIONS.items():
        setattr(fovlm.model.encoder, name, functools.partial(operation, implementation=implementation))


def packs() -> list[Batch]:
    """An image that is looked at several times, and a video with one look a frame."""
    image = sample("image", frames=1, looks=4, text=6)
    return [pack([image], PackSize(1, 4, 6, 0)), pack([sample("video", frames=2, text=7)], PackSize(2, 2, 7, 0))]


def sensitive_model() -> FoveatedVLM:
    """Weights so wide that looks decide: with a deviation of 0.02 a narrow model hardly notices a wrong attention."""
    model = tiny_model(visual_scale=1.0).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and ".layer" in name:
                p *= p.shape[1] ** -0.5 / p.std()
    return model


def curve(steps: int) -> list[float]:
    """The loss of each step of AdamW on a fresh model."""
    model, batches = sensitive_model(), packs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = sum(text_loss(model(batch), batch).total for batch in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def both(steps: int) -> None:
    """Print the curves."""
    torch.set_num_threads(1)
    found = {}
    for implementation in ("reference", "triton"):
        use(implementation)
        found[implementation] = curve(steps)
    print(json.dumps(found))
