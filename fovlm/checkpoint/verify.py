"""Verify a conversion: reload the model and compare its NLL with the values recorded at save time."""

from pathlib import Path

import torch

from fovlm.checkpoint.reference import FILE, ReferenceOutputs, collate_tight, mean_nll, split_nll
from fovlm.checkpoint.zero_reader import Weights
from fovlm.errors import UserError
from fovlm.model.encoders.dinov2 import released_name
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import load_model

# The largest mean |NLL as converted - NLL as recorded| over the reference tokens, in nats. The model computes in the
# precision of training, with the same weights, so the difference is another device's rounding at most (on the same
# machine: 3e-8 in fp32, 1e-5 in bf16).
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}


def check(out: Path, checkpoint: Path, dtype: torch.dtype, stored: Weights) -> str:
    """Load the written model and compare it with the reference outputs -> a sentence with the result.

    Where fp32 weights were written as bf16, each must be the stored one rounded, bit for bit; the comparison then uses
    the stored ones, so that rounding hides no difference. Raises UserError if the model is not the trained one.
    """
    reference = ReferenceOutputs.load(checkpoint)
    if reference is None:
        load_model(out, dtype)
        return f"Not verified: the checkpoint has no reference outputs ({FILE}). The model loads with all its weights."
    trained = getattr(torch, reference.precision)
    model = load_model(out, trained)
    rounded = trained != dtype == torch.bfloat16
    if rounded:
        restore_weights(model, stored)
    nll = reference_nll(model, reference)
    difference = float((torch.cat(nll) - torch.cat(reference.nll)).abs().mean())
    limit = TOLERANCE[reference.precision]
    recorded = mean_nll(reference.nll)
    numbers = (
        f"NLL {mean_nll(nll):.6f} as converted{' before rounding' if rounded else ''}, {recorded:.6f} as "
        f"recorded in training ({reference.precision}), mean difference per token {difference:.2g} "
        f"over {len(nll)} samples"
    )
    if not difference <= limit:  # also NaN
        raise UserError(f"{checkpoint}: the converted model is not the trained one: {numbers}; {limit:g} is allowed")
    exact = "; every weight is the trained one rounded to bf16" if rounded else ""
    return f"Verified: {numbers} ({limit:g} is allowed){exact}."


@torch.no_grad()
def restore_weights(model: FoveatedVLM, stored: Weights) -> None:
    """Replace weights that were rounded to bf16 by the stored ones. Raises UserError if one is not that, rounded."""
    sources = {released_name(name): name for name in (*stored.ties, *stored.shapes)}
    for name, weight in model.state_dict().items():
        source = sources.get(released_name(name))
        if source is None:  # a tied weight, stored under its other name
            continue
        exact = stored.read(source)
        if not torch.equal(weight.to(torch.bfloat16), exact.to(torch.bfloat16)):
            raise UserError(f"the converted model is not the trained one: {name} is not the stored weight in bf16")
        weight.copy_(exact)


@torch.no_grad()
def reference_nll(model: FoveatedVLM, reference: ReferenceOutputs) -> list[torch.Tensor]:
    """The model's NLL f32 [s] of each reference sample."""
    batch = collate_tight(reference.samples, model.config.tokens_per_look)
    return split_nll(model(batch), batch, len(reference.samples))
