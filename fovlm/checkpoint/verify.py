"""Is a written model the one that was trained? It is loaded and asked what the engine was asked at the save."""

from pathlib import Path

import torch

from fovlm.checkpoint.reference import ReferenceOutputs, by_sample, mean_nll, snug
from fovlm.checkpoint.zero_reader import ZeroWeights
from fovlm.errors import UserError
from fovlm.model.encoder import released_name
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import load_model

# How far the mean over the probe's tokens of |nll as converted - nll as recorded| may be, in nats. The model is asked
# in the type that the engine had: the same weights then, and another device's rounding at most (seen on one machine:
# 3e-8 in fp32, 1e-5 in bf16).
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}


def check(out: Path, checkpoint: Path, dtype: torch.dtype, stored: ZeroWeights) -> str:
    """Load what was written and ask it what the engine was asked. Returns what to say. Raises UserError.

    Where fp32 weights were written as bf16, each must be the stored one rounded, to the bit; the stored ones then take
    their places in the loaded model before it is asked, so that rounding hides nothing.
    """
    probe = ReferenceOutputs.load(checkpoint)
    trained = getattr(torch, probe.precision) if probe else dtype
    # bf16 weights rounded from fp32 masters are exactly those that bf16 training computed with.
    model = load_model(out, torch.bfloat16 if probe is None and dtype == torch.bfloat16 else trained)
    rounded = probe is not None and trained != dtype == torch.bfloat16
    if rounded:
        put_back(model, stored)
    if probe is None:
        return (
            "Not verified: this checkpoint is from before the engine recorded a probe (it has no probe.safetensors). "
            "It loads, and every weight of the model was found in the shards."
        )
    nll = answers(model, probe)
    apart = float((torch.cat(nll) - torch.cat(probe.nll)).abs().mean())
    limit = TOLERANCE[probe.precision]
    ours, theirs = mean_nll(nll), probe.mean
    numbers = (
        f"nll {ours:.6f} as converted{' before rounding' if rounded else ''}, {theirs:.6f} as recorded in training "
        f"({probe.precision}), {apart:.2g} apart on the mean token of {len(probe.samples)} samples"
    )
    if not apart <= limit:  # NaN is no match either
        raise UserError(f"{checkpoint}: the converted model is not the trained one: {numbers}; {limit:g} is allowed")
    exact = "; every weight is the trained one rounded to bf16" if rounded else ""
    return f"Verified: {numbers} ({limit:g} is allowed){exact}."


@torch.no_grad()
def put_back(model: FoveatedVLM, stored: ZeroWeights) -> None:
    """Put the stored weights in the place of those rounded to bf16. Raises UserError for one that is not their like."""
    sources = {released_name(name): name for name in (*stored.ties, *stored.shapes)}
    for name, weight in model.state_dict().items():
        source = sources.get(released_name(name))
        if source is None:  # a tied weight, which stands under its other name as well
            continue
        exact = stored.read(source)
        if not torch.equal(weight.to(torch.bfloat16), exact.to(torch.bfloat16)):
            raise UserError(f"the converted model is not the trained one: {name} is not the stored weight in bf16")
        weight.copy_(exact)


def answers(model: FoveatedVLM, probe: ReferenceOutputs) -> list[torch.Tensor]:
    """The model's nll of the probe's samples."""
    batch = snug(probe.samples, model.config.tokens_per_look)
    with torch.no_grad():
        return by_sample(model(batch), batch, len(probe.samples))
