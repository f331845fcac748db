"""The gaze: its weights are those of the looks that `generate` takes, its tokens are in order, and its files agree."""

import json
import time
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.packing import PackBudget
from fovlm.errors import UserError
from fovlm.media import decode
from fovlm.media.clip import Clip
from fovlm.model.processing import FoveatedProcessor
from fovlm.train.attention_maps import packs, save_maps, watched_samples
from fovlm.viz.answer import stream_answer
from fovlm.viz.contact_sheet import save_weights, write_contact_sheet
from fovlm.viz.gaze import Gaze, gaze_of
from fovlm.viz.heatmap import draw_heatmap, maps, smooth
from fovlm.viz.video import write_video
from helpers import tiny
from helpers.models import FRAME, tiny_model

QUESTION = "what is this ?"
FILM = 10  # frames: more than are encoded at once


def clip(frames: int = FILM, still: bool = False) -> Clip:
    random = torch.Generator().manual_seed(5)
    shown = torch.randint(0, 256, (frames, 3, FRAME, FRAME), dtype=torch.uint8, generator=random)
    return Clip(shown, [float(n) for n in range(frames)], "film", still=still)


def gaze(asked: str | None = QUESTION, mode: str | None = None, shown: Clip | None = None, **settings) -> Gaze:
    model = tiny_model(**settings)
    processor = FoveatedProcessor.from_parts(tiny.tokenizer(), model.config)
    return gaze_of(model.eval(), processor, shown or clip(), asked, 4, mode)


@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
def test_fine_weights_are_those_of_the_looks_that_generate_takes(prompt, monkeypatch):
    model = tiny_model(question=prompt).eval()
    processor = FoveatedProcessor.from_parts(tiny.tokenizer(), model.config)
    heard: list[tuple[int, int]] = []
    found = gaze_of(model, processor, clip(), QUESTION, 4, on_progress=lambda done, of: heard.append((done, of)))
    assert heard == [(8, FILM), (FILM, FILM)]
    taken, look = [], model.look

    def recorded(query, cache, frame_of_look=None):
        taken.append(model.encoder.look_weights(model.connector.query_in(query), cache, frame_of_look))
        return look(query, cache, frame_of_look)

    monkeypatch.setattr(model, "look", recorded)
    inputs = processor(text=QUESTION, videos=clip().frames)
    answer = processor.batch_decode(model.generate(**inputs, max_new_tokens=4))[0]
    assert np.allclose(found.weights["fine"], torch.cat(taken, dim=1).numpy(), atol=1e-5)
    assert found.answer == answer.strip()


@pytest.mark.parametrize("mode", ["autoregressive", "coarse_fine"])
def test_weights_and_entropy_are_in_their_range(mode):
    found = gaze(mode=mode)
    assert list(found.weights) == ["coarse", "fine"]
    for name, weights in found.weights.items():
        assert weights.shape == (3, FILM, 2, 17)
        assert np.allclose(weights.sum(-1), 1, atol=1e-5)
        assert found.entropy[name].shape == (FILM,)
        assert (found.entropy[name] > 0).all()
        assert (found.entropy[name] <= 1).all()


def test_deployed_and_parallel_queries_agree_at_first_and_then_differ():
    deployed, parallel = gaze().weights["fine"], gaze(mode="coarse_fine").weights["fine"]
    assert np.allclose(deployed[:, 0], parallel[:, 0], atol=1e-5)
    assert not np.allclose(deployed[:, 2:], parallel[:, 2:], atol=1e-4)


def test_the_question_steers_the_gaze_only_before_the_frames():
    other = "yes no red blue"
    for prompt, steers in (("before_frames", True), ("after_frames", False)):
        one, two = (gaze(question, question=prompt) for question in (QUESTION, other))
        assert np.allclose(one.weights["coarse"], two.weights["coarse"])
        assert np.allclose(one.weights["fine"], two.weights["fine"], atol=1e-6) != steers


@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
def test_tokens_are_in_the_order_of_the_language_model(prompt):
    kinds = [token.kind for token in gaze(question=prompt).tokens]
    looks = [token.look for token in gaze(question=prompt).tokens if token.kind == "frame"]
    assert looks == list(range(FILM))
    order = {"before_frames": ["question", "frame", "answer"], "after_frames": ["frame", "question", "answer"]}[prompt]
    assert [kind for kind in dict.fromkeys(kinds) if kind != "template"] == order
    assert kinds.index("frame") == (
        0 if prompt == "after_frames" else kinds.index("question") + kinds.count("question")
    )
    said = "".join(token.text for token in gaze(question=prompt).tokens if token.kind == "question")
    assert said.replace(" ", "") == QUESTION.replace(" ", "")


def test_closing_an_answer_ends_it_at_the_next_frame():
    heard, begun, ended = [], Event(), Event()

    def work(streamer, stopping_criteria, on_progress):
        try:
            for done in range(1000):
                streamer.text_queue.put("word")
                on_progress(done, 1000)
                begun.set()
                time.sleep(0.01)
        finally:
            ended.set()

    processor = FoveatedProcessor.from_parts(tiny.tokenizer(), tiny_model().config)
    said = stream_answer(processor, work, lambda done, of: heard.append(done))
    assert next(said) == "word"
    assert begun.wait(10)
    said.close()
    assert ended.wait(5)
    assert 0 < len(heard) < 500


def test_each_kind_of_model():
    assert list(gaze(visual="coarse").weights) == ["coarse"]
    assert gaze(deep_query=False).weights["fine"].shape == (1, FILM, 2, 17)
    assert gaze(None).answer == ""
    assert {token.kind for token in gaze(None).tokens} == {"frame"}
    assert gaze(None, question="before_frames").question  # its looks need one
    image = gaze(shown=clip(1, still=True), image_frames=3)
    assert image.weights["fine"].shape[1] == len(image.frames) == len(image.seconds) == 3
    with pytest.raises(UserError, match="no gaze"):
        gaze(visual="multi_token")
    with pytest.raises(UserError, match="coarse_fine"):
        gaze(mode="coarse_fin")


def test_smooth_maps_keep_their_places():
    weights = torch.zeros(1, 1, 1, 17)
    weights[..., 1 + 6] = 1.0  # row 1, column 2 of 4 x 4
    light = smooth(maps(weights), 40)[0]
    row, column = divmod(int(light.argmax()), 40)
    assert (row // 10, column // 10) == (1, 2)
    assert light.min() >= 0
    painted = draw_heatmap(torch.full((1, 3, 40, 40), 100, dtype=torch.uint8), maps(weights))
    assert painted[0, 15, 25].sum() > 2 * painted[0, 38, 2].sum()


def test_files(tmp_path):
    found = gaze("costs $5 or $6_ ?")
    film = write_video(found, tmp_path / "m.mp4", layer=1).read_bytes()
    assert decode.video_seconds(film, "mp4") == FILM // 2
    assert write_contact_sheet(found, tmp_path / "s.png", head=1).read_bytes()[1:4] == b"PNG"
    high = write_contact_sheet(gaze("a long question " * 12), tmp_path / "high.png")  # the title in lines, all of it
    assert Image.open(high).height > Image.open(tmp_path / "s.png").height
    stored = np.load(save_weights(found, tmp_path / "w.npz"))
    assert np.allclose(stored["fine"], found.weights["fine"], atol=1e-3)
    assert "CLS" in str(stored["axes"])
    with pytest.raises(UserError, match="0 to 2"):
        write_contact_sheet(found, tmp_path / "s.png", layer=3)


def test_the_same_clips_are_watched_whatever_the_packs(tmp_path):
    sources = {"clips": DataSource(shards=tiny.clips(tmp_path, "v", [3, 2, 4, 3, 1, 2]), kind="video")}
    sources["words"] = DataSource(shards=tiny.clips(tmp_path, "w", [0, 0, 0]), kind="text")
    chat = ChatTokenizer(tiny.tokenizer(), "before_frames", "all_text", 48)
    val = Dataset(sources, dict.fromkeys(sources, 1.0), chat, frame_size=FRAME)
    samples = watched_samples(val, 4)
    assert [s.key for s in samples] == [s.key for s in watched_samples(val, 6)][:4]
    assert len(watched_samples(val)) == 6
    assert all(len(s.frames) for s in samples)
    stored = []
    for n, budget in enumerate((PackBudget(60, 4), PackBudget(400, 4))):
        assert sum(len(batch.keys) for batch in packs(samples, budget)) == 4
        path = save_maps(tiny_model().eval(), samples, budget, chat.tokenizer, tmp_path / "maps", n)
        stored.append(np.load(path.with_suffix(".npz")))
    assert np.allclose(stored[0]["fine"], stored[1]["fine"], atol=1e-3)
    assert stored[0]["clip"].tolist() == [n for n, s in enumerate(samples) for _ in s.frames]
    assert all(" → " in text and "assistant" not in text for text in stored[0]["texts"].tolist())
    page = (tmp_path / "maps" / "index.html").read_text()
    assert json.dumps([[0, "step-00000000.png"], [1, "step-00000001.png"]]) in page
