"""The ordinary interface: what the processor makes is what training sees, and answers are those of the scored model."""

import re

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from fovlm.data.chat import ChatTokenizer
from fovlm.data.packing import PackSize, Sample, collate
from fovlm.errors import UserError
from fovlm.model.autoregressive import autoregressive
from fovlm.model.generation import unpadded
from helpers import ROOT
from helpers.interface import QUESTION, frames, model_of, processor_of, says
from helpers.models import FRAME, VOCABULARY
from helpers.tiny import picture, tokenizer, video


def test_what_the_docs_show_in_python_runs(tmp_path, monkeypatch, capsys):
    """As it stands there, with a model that has a context as short as the quickstart's."""
    model = model_of(question="before_frames")
    model.config.llm_config.max_position_embeddings = 256
    for part in (model, processor_of(model)):
        part.save_pretrained(tmp_path / "converted" / "quickstart")
    (tmp_path / "clip").mkdir()
    for i in range(4):
        (tmp_path / "clip" / f"{i}.jpg").write_bytes(picture(40 * i))
    monkeypatch.chdir(tmp_path)
    blocks = {}
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if found := re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            blocks[file.name] = found
    assert list(blocks) == ["conversion.md"], "Python elsewhere needs a test, too"
    exec("\n".join(blocks["conversion.md"]), {})
    out = capsys.readouterr().out
    assert re.findall(r"after (\d) frames: ", out) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
def test_tokens_are_those_of_training(prompt):
    processor = processor_of(model_of(question=prompt))
    inputs = processor(messages=says(QUESTION, video=frames(3)))
    trained = ChatTokenizer(tokenizer(), prompt, "answer", 999).text({"user": QUESTION, "assistant": "red"}, None, True)
    answer_at = int(trained.weight.argmax())
    assert inputs["input_ids"][0].tolist() == trained.tokens[:answer_at].tolist()
    assert inputs["prompt"].tolist() == [trained.prompt]
    assert (trained.prompt > 0) == (prompt == "before_frames")


def test_conversations_go_on_and_keep_their_frames_where_they_were_shown():
    processor = processor_of(model_of(question="before_frames"))
    first = processor(messages=says(QUESTION, video=frames(2)))
    turns = [*says(QUESTION, video=frames(2)), {"role": "assistant", "content": "red"}, *says("is it blue ?")]
    more = processor(messages=turns)
    n = first["input_ids"].shape[1]
    assert more["prompt"] == first["prompt"]
    assert more["looks"].tolist() == [[1, 1]]
    assert more["input_ids"][0, :n].tolist() == first["input_ids"][0].tolist()
    assert processor.decode(more["input_ids"][0, n:]).split()[2:6] == ["is", "it", "blue", "?"]


def test_frames_come_in_many_forms(tmp_path):
    processor = processor_of(model_of(image_frames=4))
    shown = frames(3)
    same = [shown, shown.numpy(), shown.permute(0, 2, 3, 1).numpy(), list(shown), shown.float() / 255]
    for given in same:
        inputs = processor(messages=says(QUESTION, video=given))
        assert torch.equal(inputs["frames"], shown[None]), type(given)
    (tmp_path / "a.mp4").write_bytes(video(3, size=32))
    (tmp_path / "a.jpg").write_bytes(picture(200, 40))
    seen = processor(messages=says(QUESTION, video=tmp_path / "a.mp4"))
    assert seen["frames"].shape == (1, 3, 3, FRAME, FRAME)
    assert seen["looks"].tolist() == [[1, 1, 1]]
    seen = processor(messages=says(QUESTION, image=str(tmp_path / "a.jpg")))
    assert seen["frames"].shape == (1, 1, 3, FRAME, FRAME)
    assert seen["looks"].tolist() == [[4]]
    tall = np.full((2, 90, 40, 3), 7, np.uint8)
    assert processor(text=QUESTION, videos=tall)["frames"].shape == (1, 2, 3, FRAME, FRAME)
    assert processor(text=QUESTION, images=[tall[0], tall[1]])["looks"].tolist() == [[4, 4]]
    long = processor(text=QUESTION, videos=frames(1).expand(100, -1, -1, -1))
    assert long["looks"].sum() == processor.max_frames


def test_a_batch_is_padded_on_the_left():
    processor = processor_of(model_of())
    inputs = processor(text=[QUESTION, "red ?", "is it ?"], videos=[frames(2), None, frames(3)])
    assert inputs["frames"].shape[:2] == (3, 3)
    assert inputs["looks"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    mask = inputs["attention_mask"]
    assert mask[:, -1].all()
    assert not mask[1, 0]
    assert (mask.diff() >= 0).all()
    assert "frames" not in processor(text="is it ?")


@pytest.mark.parametrize(
    ("call", "says_so"),
    [
        ({"messages": says("", video=frames(1))}, "a turn has no text"),
        ({"messages": says(QUESTION, vidoe=frames(1))}, "did you mean 'video'"),
        ({"messages": says(QUESTION, video=frames(0))}, "no frames"),
        ({"messages": says(QUESTION, video="nowhere.mp4")}, "no such file"),
        ({"messages": says(QUESTION, video=torch.zeros(1, 4, 9, 9))}, "a frame is"),
        ({"messages": says(QUESTION, video=frames(1).int())}, "pixels are u8"),
        ({"messages": [{"role": "assistant", "content": "red"}]}, "the last turn of a conversation must be"),
        ({"messages": says(QUESTION, image=frames(1)[0]) * 2}, "one turn"),
        ({"text": [QUESTION, QUESTION], "videos": [frames(1)]}, "2 texts and 1 videos"),
        ({}, "either messages, or text"),
    ],
)
def test_a_mistake_is_one_line(call, says_so):
    with pytest.raises(UserError, match=says_so) as error:
        processor_of(model_of())(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
@pytest.mark.parametrize("mode", ["autoregressive", "coarse_fine", "coarse_only"])
def test_the_first_token_is_the_likeliest_by_the_scored_model(mode, prompt):
    model = model_of(question=prompt, image_frames=2)
    processor = processor_of(model)
    for shown in ({"video": frames(3)}, {"image": frames(1)[0]}, {}):
        inputs = processor(messages=says(QUESTION, **shown))
        out = model.generate(
            **inputs, mode=mode, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, do_sample=False
        )
        looks = int(inputs["looks"].sum()) if shown else 0
        seen = inputs["frames"][0].repeat(looks // len(inputs["frames"][0]), 1, 1, 1) if shown else frames(0)
        nll = []
        for word in range(VOCABULARY):
            tokens = torch.cat([inputs["input_ids"][0], torch.tensor([word])])
            sample = Sample("", "", seen, looks, tokens, torch.ones(len(tokens)), int(inputs["prompt"]))
            size = PackSize(max(1, len(seen)), max(1, looks), len(tokens), sample.prompt)  # a pack has a frame at least
            batch = collate([sample], FRAME, size=size)
            if mode == "autoregressive":
                scores = autoregressive(model, batch)
            else:
                scores = model(batch, visual="coarse" if mode == "coarse_only" else None)
            nll.append(scores[-1].item())
            if word >= 7:
                break
        expected = -out.logits[0][0].log_softmax(-1)[: len(nll)]
        torch.testing.assert_close(torch.tensor(nll), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("visual", ["foveated", "coarse", "multi_token"])
@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
def test_a_batch_answers_as_each_alone(visual, prompt):
    model = model_of(visual=visual, question=prompt, image_frames=3)
    processor = processor_of(model)
    asked = [
        says(QUESTION, video=frames(5)),
        says("red ?"),
        says("is it blue or red here ?", image=frames(1, 1)[0]),
        says(QUESTION, video=frames(2, 2)),
        says(QUESTION, video=frames(5, 3)),
    ]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**processor(messages=asked), **settings)
    for row, messages in enumerate(asked):
        alone = model.generate(**processor(messages=messages), **settings)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        for both, one in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(both[row], one[0], rtol=1e-4, atol=1e-4)


def test_what_is_seen_matters():
    model = model_of()
    inputs = processor_of(model)(text=[QUESTION] * 2, videos=[frames(2), frames(2, 1)])
    parts = (inputs[name] for name in ("input_ids", "attention_mask", "frames", "looks", "prompt"))
    x, mask = model.embed(unpadded(*parts))
    assert mask.all()
    assert not torch.allclose(x[0], x[1])


def test_usual_arguments():
    model = model_of()
    inputs = processor_of(model)(messages=says(QUESTION, video=frames(2)))
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)
    assert model.generate(**inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2).shape[0] == 2
    torch.manual_seed(0)
    wild = {
        tuple(model.generate(**inputs, max_new_tokens=3, do_sample=True, temperature=50.0, top_p=0.9)[0].tolist())
        for _ in range(4)
    }
    assert len(wild) > 1
    settings = GenerationConfig(max_new_tokens=2, min_new_tokens=2)
    assert model.generate(**inputs, generation_config=settings).shape == (1, 2)
    first = int(model.generate(**inputs, max_new_tokens=1)[0, 0])
    assert model.generate(**inputs, max_new_tokens=5, eos_token_id=first).tolist() == [[first]]
    model.generation_config.eos_token_id = first  # as a folder has it; its language model may know another
    assert model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=5)).tolist() == [[first]]

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, ids):
            self.tokens += ids.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, done = Streamer(), []
    out = model.generate(**inputs, max_new_tokens=4, streamer=streamer, on_progress=lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


def test_a_question_longer_than_the_context_is_one_line_and_answers_end_with_it():
    model = model_of()
    model.config.llm_config.max_position_embeddings = 60
    processor = processor_of(model)
    with pytest.raises(UserError, match=r"\d+ tokens of text and 2 of frames .* context of 60"):
        model.generate(**processor(text="red " * 80, videos=frames(2)))
    inputs = processor(text="red", videos=frames(2))
    room = 60 - 2 - inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_new_tokens=500, min_new_tokens=room).shape[1] == room
    with pytest.raises(UserError, match="did you mean 'coarse_fine'"):
        model.generate(**inputs, mode="coarse_fin")
