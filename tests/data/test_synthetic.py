"""The embedded task: what is drawn, written and judged is what the question, the answer and the truth say."""

import json
import math

import numpy as np
import pytest
import torch

from fovlm.config import schema
from fovlm.config.schema import SyntheticTask
from fovlm.data import synthetic
from fovlm.data.chat import ChatTokenizer, load_tokenizer
from fovlm.data.dataset import open_dataset
from fovlm.data.packing import PackSize, Sample, collate
from fovlm.media.decode import decode_pictures
from fovlm.media.encode import encode_jpeg
from fovlm.train import synthetic_score

TASK = SyntheticTask(train_clips=24, val_clips=5, frames=3, objects=[2, 5], names=20, marks=7, grid=3, patch=14)
RUNS = ("quickstart", "hunt", "hunt_coarse")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))


def draw(task: SyntheticTask = TASK, clips: int = 12, seed: int = 0) -> synthetic.Clips:
    return synthetic.generate(task, np.random.default_rng(seed), clips, task.frames, task.objects)


def patches(frames: np.ndarray, p: int) -> np.ndarray:
    """[..., G * p, G * p, 3] -> [..., G * G, p, p, 3]."""
    side = frames.shape[-2] // p
    grid = frames.reshape(*frames.shape[:-3], side, p, side, p, 3)
    return np.moveaxis(grid, -3, -4).reshape(*frames.shape[:-3], side * side, p, p, 3)


def read(frames: np.ndarray, task: SyntheticTask) -> np.ndarray:
    """The sprite that every patch is nearest to, i64 [..., G * G]: 0 is empty, else 1 + name * marks + mark."""
    known = synthetic.sprites(task.names, task.marks, task.patch).reshape(-1, task.patch**2 * 3).astype(np.float32)
    seen = patches(frames, task.patch)
    flat = seen.reshape(-1, known.shape[1]).astype(np.float32)
    distance = (known**2).sum(1) - 2 * flat @ known.T  # up to what all sprites share
    return distance.argmin(1).reshape(seen.shape[:-3])


def files(task: SyntheticTask) -> dict[str, bytes]:
    folder = synthetic.folder(task)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answered(tokenizer, tokens: torch.Tensor, weight: torch.Tensor) -> str:
    """The words that are learnt, which end with the token that ends the turn."""
    *words, end = tokens[weight > 0].tolist()
    assert end == tokenizer.eos_token_id
    return tokenizer.decode(words)


def test_clips_are_a_function_of_the_seed():
    one, same, other = draw(), draw(), draw(seed=1)
    for name in ("frames", "asked", "marks", "cell", "objects"):
        assert np.array_equal(getattr(one, name), getattr(same, name)), name
    assert not np.array_equal(one.frames, other.frames)


def test_the_asked_object_is_where_it_says_with_the_mark_it_says():
    clips = draw()
    seen = read(clips.frames, TASK)
    there = np.take_along_axis(seen, clips.cell[..., None], 2)[..., 0]
    assert np.array_equal(there, 1 + clips.asked[:, None] * TASK.marks + clips.marks)


def test_every_object_of_a_clip_is_in_every_frame_once():
    clips = draw()
    for frames, objects in zip(read(clips.frames, TASK), clips.objects, strict=True):
        called = [sorted((cell[cell > 0] - 1) // TASK.marks) for cell in frames]
        assert all(len(set(names)) == len(names) == objects for names in called)
        assert all(names == called[0] for names in called)
    assert set(clips.objects) == set(TASK.objects)


def test_places_names_and_marks_are_spread_evenly():
    clips = draw(clips=4000)
    for values, count in ((clips.cell, TASK.grid**2), (clips.asked, TASK.names), (clips.marks, TASK.marks)):
        share = np.bincount(values.ravel(), minlength=count) / values.size
        assert np.abs(share * count - 1).max() < 0.25
    stays = (clips.cell[:, 1:] == clips.cell[:, :-1]).mean()
    assert abs(stays - 1 / TASK.grid**2) < 0.02, "the place in one frame must say nothing about the next"


def test_a_mark_follows_neither_from_the_frame_before_nor_from_the_name():
    """Else the blind loss printed beside a result would not be the best without a picture."""
    clips = draw(clips=4000)
    for given, size in ((clips.marks[:, :-1].ravel(), TASK.marks), (np.repeat(clips.asked, 2), TASK.names)):
        joint = np.bincount(given * TASK.marks + clips.marks[:, 1:].ravel(), minlength=size * TASK.marks)
        joint = joint.reshape(size, TASK.marks) / joint.sum()
        apart = joint.sum(1, keepdims=True) * joint.sum(0)
        assert (joint * np.log(joint / apart)).sum() < 0.02


def test_all_names_and_marks_are_read_back_from_jpeg():
    task = SyntheticTask(names=24, marks=10, grid=16)
    known = synthetic.sprites(24, 10, task.patch)
    canvas = np.concatenate([known, np.repeat(known[:1], 15, 0)]).reshape(16, 16, task.patch, task.patch, 3)
    canvas = canvas.transpose(0, 2, 1, 3, 4).reshape(16 * task.patch, 16 * task.patch, 3)
    seen = decode_pictures([("jpg", encode_jpeg(canvas))], 16 * task.patch)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(read(seen, task)[:241], np.arange(241))


def test_every_question_and_answer_survives_the_tokenizer():
    tokenizer = synthetic.tokenizer(TASK)
    said = [synthetic.QUESTION.format(name=name) for name in synthetic.names(24)] + ["0 1 2 3 4 5 6 7 8 9"]
    said += [text[key] for s in synthetic._texts(TASK, 40) for text in (s["json"],) for key in ("user", "assistant")]
    for text in said:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_frames_stand_right_behind_the_question():
    tokenizer = synthetic.tokenizer(TASK)
    chat = ChatTokenizer(tokenizer, "before_frames", "answer", 64)
    text = chat.text({"user": "what does the red gate show?", "assistant": "3 1 5"}, None, frames=True)
    assert tokenizer.decode(text.tokens[: text.prompt]).endswith("the red gate show?")
    assert answered(tokenizer, text.tokens, text.weight) == "3 1 5"
    assert tokenizer.unk_token_id not in text.tokens


def test_text_alone_counts_on():
    for sample in synthetic._texts(TASK, 30):
        _, many, _, first = sample["json"]["user"].split()
        answer = [int(word) for word in sample["json"]["assistant"].split()]
        assert synthetic.NUMBERS[len(answer)] == many
        assert answer == [(int(first) + n) % TASK.marks for n in range(len(answer))]


def test_the_same_settings_give_the_same_bytes_and_are_written_once():
    synthetic.make(TASK)
    first = files(TASK)
    stamp = synthetic.folder(TASK).stat().st_mtime_ns
    synthetic.make(TASK)
    assert synthetic.folder(TASK).stat().st_mtime_ns == stamp

    again = TASK.model_copy(update={"folder": "again"})
    synthetic.make(again)
    differing = {name for name, data in files(again).items() if data != first[name]}
    assert differing == {"task.json"}  # it names the folder


def test_other_settings_replace_the_files_and_a_broken_off_attempt_is_no_hindrance():
    synthetic.make(TASK)
    before = files(TASK)
    left = synthetic.folder(TASK).with_name(f".{TASK.folder}.killed.unfinished")
    left.mkdir()
    (left / "video-000.tar").write_bytes(b"half")
    synthetic.make(TASK.model_copy(update={"seed": 1}))
    after = files(TASK)
    assert set(after) == set(before)
    assert all(after[name] != before[name] for name in after if name.endswith(".tar"))
    assert not left.exists()


def test_what_a_run_reads_is_what_the_truth_says():
    """From the settings to the shards, the index, the decoder and the tokens; then read off the asked cell."""
    experiment = schema.load("quickstart", ["data.generate.train_clips=24", "data.generate.val_clips=16"])
    task = experiment.data.generate
    synthetic.make(task)
    tokenizer = load_tokenizer(str(synthetic.folder(task) / "tokenizer"))
    data = open_dataset(experiment, tokenizer, {"val": 1.0})
    truth = json.loads((synthetic.folder(task) / synthetic.TRUTH).read_text())
    assert data.samples == {"val": 16}
    assert len(truth) == 32  # 16 clips, and 16 pictures of `val_image`
    for position in range(16):
        (sample,), bad = data.read(position)
        assert bad is None
        seen = read(sample.frames.permute(0, 2, 3, 1).numpy(), task)
        assert ((seen > 0).sum(1) == max(task.objects)).all(), "validation has the crowded clips only"
        asked = [seen[frame, cell] - 1 for frame, cell in enumerate(truth[sample.key.rpartition("/")[2]])]
        name = synthetic.names(task.names)[asked[0] // task.marks]
        assert synthetic.QUESTION.format(name=name) in tokenizer.decode(sample.tokens)
        answer = answered(tokenizer, sample.tokens, sample.weight)
        assert answer == " ".join(str(sprite % task.marks) for sprite in asked)


def test_training_has_every_source_in_its_share():
    experiment = schema.load("quickstart", ["data.generate.train_clips=24", "data.generate.val_clips=5"])
    synthetic.make(experiment.data.generate)
    tokenizer = load_tokenizer(str(synthetic.folder(experiment.data.generate) / "tokenizer"))
    data = open_dataset(experiment, tokenizer, experiment.data.mixture)
    assert data.samples == {"video": 24, "image": 3, "words": 3}
    looks = [sample.looks for position in range(20) for sample in data.read(position)[0]]
    assert sorted(looks) == [0] * 2 + [1] * 2 + [4] * 16


@pytest.mark.parametrize("name", RUNS)
def test_the_named_runs_fit_their_task(name):
    experiment = schema.load(name)
    task, model, data = experiment.data.generate, experiment.model, experiment.data
    assert model.question == "before_frames"
    assert model.frame_size == model.encoder["image_size"] == task.grid * task.patch
    assert model.encoder["patch_size"] == task.patch, "one object, one patch"
    assert max(task.objects) <= min(task.names, task.grid**2)
    assert task.names <= len(synthetic.names(99))
    tokenizer = synthetic.tokenizer(task)
    assert len(tokenizer) <= model.llm["vocab_size"]
    longest = ChatTokenizer(tokenizer, "before_frames", "answer", 1000).text(
        {"user": synthetic.QUESTION.format(name="red gate"), "assistant": "1 " * task.frames}, None, frames=True
    )
    assert len(longest.tokens) <= data.max_tokens
    assert task.frames <= data.max_frames


def test_the_pair_differs_in_the_look_alone():
    looking, static = (schema.load(name) for name in ("hunt", "hunt_coarse"))
    assert looking.data == static.data
    assert looking.optim == static.optim
    assert looking.train == static.train
    assert looking.model.model_copy(update={"visual": "coarse"}) == static.model


def test_blind_loss_is_that_of_guessing_every_mark():
    assert synthetic_score.blind_loss(SyntheticTask(frames=4, marks=8)) == pytest.approx(4 * math.log(8) / 5)
    assert synthetic_score.blind_loss(SyntheticTask(frames=1, marks=10)) == pytest.approx(math.log(10) / 2)


class Gaze:
    """In place of a model: 2 layers, 2 heads, with the same attention for every look."""

    def __init__(self, fine: torch.Tensor):
        self.fine = fine  # [K, G * G + 1]

    def gaze(self, batch) -> dict[str, torch.Tensor]:
        return {"fine": self.fine[None, :, None].expand(2, -1, 2, -1)}


def judged(weights_of, kinds=("val", "val_image")) -> dict[str, float]:
    """The verdict on looks at these kinds, whose weights over CLS and the patches come from (cell, patches)."""
    synthetic.make(TASK)
    truth = json.loads((synthetic.folder(TASK) / synthetic.TRUTH).read_text())
    side, count = TASK.grid * TASK.patch, TASK.grid**2
    samples, weights = [], []
    for key, cells in truth.items():
        if key.rstrip("0123456789") not in kinds:
            continue
        frames = torch.zeros(len(cells), 3, side, side, dtype=torch.uint8)
        samples.append(Sample(f"val-000.tar/{key}", "val", frames, len(cells), torch.ones(2).long(), torch.ones(2)))
        weights += [torch.cat([torch.zeros(1), weights_of(cell, count)]) for cell in cells]
    if "text" in kinds:
        samples.append(Sample("text-000.tar/text000000", "words", frames[:0], 0, torch.ones(2).long(), torch.ones(2)))
    looks = len(weights) + 4  # and padding, which must not count
    weights += [torch.eye(count + 1)[1]] * 4
    batch = collate(samples, side, size=PackSize(looks, looks, 2 * len(samples), 0))
    return synthetic_score.score_looks(TASK, Gaze(torch.stack(weights)), [batch], "cpu")


def test_looks_on_the_asked_object_are_found_there():
    facts = judged(lambda cell, count: torch.eye(count)[cell])
    assert facts["fine looks on the asked object"] == 1.0
    assert facts["attention of fine looks on it"] == 1.0
    assert facts["looks on it by chance"] == 1 / 5


@pytest.mark.parametrize(
    ("kinds", "frames"),
    [(["val"], 3), (["val_image"], 1), (["val", "val_image"], 2)],
    ids=["clips", "pictures", "both"],
)
def test_the_blind_loss_is_that_of_what_was_scored(kinds, frames):
    """Of three frames a clip: ln(7) for each mark asked for, nothing for the token that ends an answer."""
    facts = judged(lambda cell, count: torch.eye(count)[cell], kinds)
    assert facts[synthetic_score.BLIND] == pytest.approx(frames * math.log(7) / (frames + 1))


def test_text_among_what_is_scored_is_no_look_and_has_no_blind_loss_here():
    facts = judged(lambda cell, count: torch.eye(count)[cell], ["val", "text"])
    assert facts["fine looks on the asked object"] == 1.0
    assert synthetic_score.BLIND not in facts


def test_looks_elsewhere_are_not():
    facts = judged(lambda cell, count: torch.eye(count)[(cell + 1) % count])
    assert facts["fine looks on the asked object"] == 0.0
    assert facts["attention of fine looks on it"] == 0.0


def test_even_attention_has_the_share_of_one_patch():
    facts = judged(lambda cell, count: torch.full((count,), 1 / count))
    assert facts["attention of fine looks on it"] == pytest.approx(1 / 9)
