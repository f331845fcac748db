"""The forward pass over padded rows, as transformers' Trainer, PEFT and TRL call it: a loss and logits.

The rows become one pack (`data/packing.py`), so the loss comes from the same nll as in our own training.

Letters: B conversations, S text tokens of a row, E language-model width, V words of the vocabulary.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fovlm.data.packing import EMPTY, collate
from fovlm.errors import UserError
from fovlm.model.generation import one_frame_a_look, unpadded

if TYPE_CHECKING:
    from fovlm.model.modeling import FoveatedVLM

IGNORED = -100  # a label that has no share in the loss


@dataclass
class PaddedOutput(ModelOutput):
    """`logits` [B, S, V] and `last_hidden_state` [B, S, E] at i are those that predict token i + 1; 0 where padded."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None  # TRL computes its loss from this one


def supervised(
    model: "FoveatedVLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    frames: Tensor | None = None,
    looks: Tensor | None = None,
    prompt: Tensor | None = None,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> PaddedOutput:
    """The loss and the logits of conversations as `FoveatedProcessor` gives them, padded on either side.

    `labels` i64 [B, S] are the tokens themselves, or -100 where a token does not count. The loss is the mean nll of
    those that do (their sum over `num_items_in_batch`, if given). Raises UserError for other labels.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    samples = [one_frame_a_look(*shown) for shown in unpadded(input_ids, mask, frames, looks, prompt)]
    size = sum((sample.size for sample in samples), EMPTY)
    size = replace(size, frames=max(size.frames, 1), looks=max(size.looks, 1))
    batch = collate(samples, model.config.frame_size, model.config.tokens_per_look, size=size).to(input_ids.device)
    hidden = model.read(batch.sequence, model.looks(batch).tokens, batch.tokens)
    loss = None
    if labels is not None:
        counts = labels != IGNORED
        if (counts & (labels != input_ids)).any():
            raise UserError(f"labels are the tokens of input_ids, or {IGNORED}: the loss is on the text itself")
        total = counts.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (model.nll(batch, hidden) * counts[mask == 1]).sum() / total
    after = batch.predict_from.roll(-1)  # where the next token is predicted; behind a sample's last, its last position
    texts = torch.tensor([len(sample.tokens) for sample in samples], device=after.device).cumsum(0)
    after[texts - 1] = torch.tensor(batch.sequence.lengths[: len(samples)], device=after.device).cumsum(0) - 1
    states = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
    states[mask == 1] = hidden[after]
    logits = model.llm.get_output_embeddings()(states) * mask[..., None]
    return PaddedOutput(loss, logits, states)
