"""The forward pass that Trainer, PEFT and TRL call: the same nll as packed training, and ten steps of each."""

import sys

import pytest
import torch
import torch.nn.functional as nnf

from fovlm import open_model
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
    renamed = {{"frames": "pixel_values"}.get(name, name): value for name, value in inputs.items()}
    assert model(**renamed).loss == found.loss
    with pytest.raises(UserError, match="frames are u8 pixels"):
        model(**inputs | {"frames": inputs["frames"].float()})
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


def fine_tune(trainer: str, model, processor, out):
    """Ten steps on four conversations, with transformers' or TRL's trainer -> the loss of each step."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = [
        [
            *says(f"what is this {n} ?", video=frames(2, seed=n)),
            {"role": "assistant", "content": ("blue", "red")[n % 2]},
        ]
        for n in range(4)
    ]
    arguments = {"max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
                 "save_strategy": "no", "report_to": [], "remove_unused_columns": False, "use_cpu": True}  # fmt: skip
    given = {"train_dataset": Dataset.from_dict({"row": list(range(4))}), "processing_class": processor,
             "data_collator": lambda picked: processor(messages=[rows[one["row"]] for one in picked])}  # fmt: skip
    if trainer == "trl":
        from trl import SFTConfig, SFTTrainer

        settings = {"gradient_checkpointing": False, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        training = SFTTrainer(model, SFTConfig(str(out), **arguments, **settings), **given)
    else:
        training = Trainer(model, TrainingArguments(str(out), **arguments), **given)
    training.train()
    training.save_model(str(out))
    return [entry["loss"] for entry in training.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "trainer",
    [
        "transformers",
        pytest.param("trl", marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")),
    ],
)
def test_trainers_lower_the_loss_and_save_a_folder_that_opens(trainer, tmp_path):
    model = model_of()
    processor = processor_of(model)
    losses = fine_tune(trainer, model, processor, tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    again, _ = open_model(tmp_path)
    inputs = conversations(processor)
    assert again(**inputs).loss.item() == pytest.approx(model.eval()(**inputs).loss.item(), rel=1e-6)


def test_peft_trains_an_adapter_that_loads_and_merges(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, base = model_of(), model_of()
    targets = r"llm\..*(q_proj|v_proj)|encoder\..*(query|key|value|q_proj|k_proj|v_proj)"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["connector"])
    processor = processor_of(model)
    tuned = get_peft_model(model, lora)
    losses = fine_tune("transformers", tuned, processor, tmp_path)
    assert losses[-1] < losses[0] - 0.5
    inputs = conversations(processor)
    with torch.no_grad():
        expected = tuned.eval()(**inputs).loss.item()
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        assert again(**inputs).loss.item() == pytest.approx(expected, rel=1e-6)
        merged = again.merge_and_unload()
        assert merged(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_adapter_on_the_keys_that_looks_absorb_counts():
    from peft import LoraConfig, get_peft_model

    model = model_of()
    inputs = conversations(processor_of(model))
    last = r"encoder\..*layer\.2\..*(key|value|k_proj|v_proj)"
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=last, init_lora_weights=False)).eval()
    with torch.no_grad():
        loss, merged = tuned(**inputs).loss.item(), tuned.merge_and_unload()(**inputs).loss.item()
    assert loss == pytest.approx(merged, abs=5e-6)  # without the adapter it is 3e-5 off
