"""Is a written model the one that was trained? It is loaded and asked what the engine was asked at the save."""

from pathlib import Path

import torch

from fovlm.errors import UserError
from fovlm.model import FoveatedVLM
from fovlm.probe import Probe, by_sample, mean_nll, snug

# How far the mean over the probe's tokens of |nll as written - nll as recorded| may be, in nats. The model is asked in
# the type that the engine had where it can be: the same weights then, and another device's rounding at most (seen on
# one machine: 3e-8 in fp32, 1e-5 in bf16). When fp32 weights are written as bf16, every weight moves by up to 1/512 of
# itself, and that is a change of the model, not an error: seen 0.005. So there a fault that moves nll by less than
# ROUNDED passes; --dtype fp32 tells.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}
ROUNDED = 0.1


def check(out: Path, checkpoint: Path, dtype: torch.dtype) -> str:
    """Load what was written and ask it what the engine was asked. Returns what to say. Raises UserError."""
    probe = Probe.load(checkpoint)
    trained = getattr(torch, probe.precision) if probe else dtype
    # bf16 weights rounded from fp32 masters are exactly those that bf16 training computed with.
    computed = torch.bfloat16 if torch.bfloat16 in (dtype, trained) else torch.float32
    model = load(out, computed)
    if probe is None:
        return (
            "Not verified: this checkpoint is from before the engine recorded a probe (it has no probe.safetensors). "
            "It loads, and every weight of the model was found in the shards."
        )
    nll = answers(model, probe)
    apart = float((torch.cat(nll) - torch.cat(probe.nll)).abs().mean())
    limit = TOLERANCE[probe.precision] if computed == trained else ROUNDED
    ours, theirs = mean_nll(nll), probe.mean
    numbers = (
        f"nll {ours:.6f} as converted ({str(computed).removeprefix('torch.')}), {theirs:.6f} as recorded in training "
        f"({probe.precision}), {apart:.2g} apart on the mean token of {len(probe.samples)} samples"
    )
    if not apart <= limit:  # NaN is no match either
        raise UserError(f"{checkpoint}: the converted model is not the trained one: {numbers}; {limit:g} is allowed")
    return f"Verified: {numbers} ({limit:g} is allowed)."


def load(folder: Path, dtype: torch.dtype) -> FoveatedVLM:
    """A written model, loaded as anyone would; a weight that is missing or left over is a UserError."""
    model, told = FoveatedVLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if wrong := [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[kind]]:
        raise UserError(f"the written model does not load: {', '.join(map(str, sorted(wrong)[:5]))}")
    return model.eval()


def answers(model: FoveatedVLM, probe: Probe) -> list[torch.Tensor]:
    """The model's nll of the probe's samples."""
    batch = snug(probe.samples, model.config.tokens_per_look)
    with torch.no_grad():
        return by_sample(model(batch), batch, len(probe.samples))
