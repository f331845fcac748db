"""Compiled layers, on trial: a run starts with them only where they compute what the plain ones do.

Nothing depends on compiling: where it fails, one warning says why, and every rank trains without.
"""

import logging
import math

import torch
from torch import Tensor

from fovlm import distributed
from fovlm.config.schema import ModelSettings
from fovlm.data.packing import Batch, Sample, collate
from fovlm.model.modeling import FoveatedVLM
from kernels.common import FAILURES, reason_of

log = logging.getLogger("fovlm")
TOLERANCE = 0.05  # relative, of a loss and of a gradient norm; bf16 rounds at 0.004


def wants_compiled(settings: ModelSettings, device: torch.device, stage: int) -> bool:
    """`model.compile`; where it is null, on a GPU with ZeRO below 3."""
    return settings.compile if settings.compile is not None else device.type == "cuda" and stage < 3


def compile_on_trial(model: FoveatedVLM, device: torch.device) -> bool:
    """Compile the layers and take a step's passes over a small pack; all ranks call it. Whether they stay compiled.

    The loss and the gradient norm must be those of the plain layers. No gradient is left behind, and no random number
    is drawn from torch's generators.
    """
    batch = trial_pack(model).to(device)
    plain = _passes(model, batch)
    model.compile_layers()
    reason = ""
    try:
        compiled = _passes(model, batch)
        if not all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(compiled, plain, strict=True)):
            reason = f"loss and gradient norm are {compiled}, not {plain}"
    except FAILURES as error:
        reason = reason_of(error)
    if reason := next((found for found in distributed.gather(reason) if found), ""):
        model.run_eagerly()
        log.warning("the layers run without torch.compile, which failed: %s", reason)
    return not reason


def trial_pack(model: FoveatedVLM) -> Batch:
    """A video of two frames with text, and a text, drawn at random."""
    random, size = torch.Generator().manual_seed(0), model.config.frame_size

    def sample(frames: int, text: int) -> Sample:
        pixels = torch.randint(0, 256, (frames, 3, size, size), dtype=torch.uint8, generator=random)
        tokens = torch.randint(0, model.config.llm_config.vocab_size, (text,), generator=random)
        return Sample(f"trial {frames}", "trial", pixels, frames, tokens, torch.ones(text))

    return collate([sample(2, 20), sample(0, 12)], size, model.config.tokens_per_look)


def _passes(model: FoveatedVLM, batch: Batch) -> tuple[float, float]:
    """The loss of a pack and the norm of its gradient, without touching what `backward` would."""
    model.train()
    loss: Tensor = model(batch, weight=batch.weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    norms = [g.norm(dtype=torch.float32) for g in gradients if g is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())
