"""The forward pass that Trainer, PEFT and TRL call: the same nll as packed training, and ten steps of each."""

import pytest
import torch
import torch.nn.functional as nnf

from fovlm.data.packing import EMPTY, collate
from fovlm.errors import UserError
from fovlm.model.generation import one_frame_a_look, unpadded
from fovlm.model.supervised import IGNORED
from helpers.interface import frames, model_of, processor_of, says

ANSWERS = ["this is blue", "blue", "this is the red picture"]


def conversations(processor):
    """A batch of three: with frames, with others, without any."""
    shown = [{"video": frames(3)}, {"video": frames(2, seed=1)}, {}]
    turns = [
        [*says(f"what is this {n} ?", **what), {"role": "assistant", "content": answer}]
        for n, (what, answer) in enumerate(zip(shown, ANSWERS, strict=True))
    ]
    return processor(messages=turns)


@pytest.mark.parametrize("question", ["after_frames", "before_frames"])
@pytest.mark.parametrize("visual", ["foveated", "multi_token"])
def test_loss_and_logits_are_those_of_the_pack(question, visual):
    model = model_of(question=question, visual=visual)
    inputs = conversations(processor_of(model))
    mask, labels = inputs["attention_mask"], inputs["labels"]
    found = model(**inputs)
    samples = unpadded(inputs["input_ids"], mask, inputs["frames"], inputs["looks"], inputs["prompt"])
    flat = [one_frame_a_look(*shown) for shown in samples]
    size = sum((sample.size for sample in flat), EMPTY)
    nll = model(collate(flat, model.config.frame_size, model.config.tokens_per_look, size=size))
    counts = labels[mask == 1] != IGNORED
    assert found.loss.item() == pytest.approx(nll[counts].mean().item(), rel=1e-6)
    shifted = nnf.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert shifted.item() == pytest.approx(found.loss.item(), rel=1e-6)
    # The word after a question is the first of its answer.
    asked = processor_of(model)(messages=says("what is this 0 ?", video=frames(3)))
    first = model.generate(**asked, max_new_tokens=1, mode="coarse_fine" if visual == "foveated" else None)[0, 0]
    assert model(**asked).logits[0, -1].argmax() == first
    assert found.logits[2, 0].eq(0).all() == bool(mask[2, 0] == 0)


def test_labels_are_the_answer_with_the_token_that_ends_it():
    processor = processor_of(model_of())
    inputs = conversations(processor)
    for row, answer in zip(inputs["labels"], ANSWERS, strict=True):
        said = processor.decode(row[row != IGNORED], skip_special_tokens=False)
        assert said.replace(" ", "") == f"{answer}<|im_end|>".replace(" ", "")
    with pytest.raises(UserError, match="labels are the tokens of input_ids"):
        model_of()(**inputs | {"labels": inputs["labels"].roll(1, 0)})
