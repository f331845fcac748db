"""The study's fast path computes what training computes, and repeats nothing."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scenes as study
from benchmarks.scene_gaze import other_questions, pointing
from benchmarks.scene_looks import Looks, Scenes
from benchmarks.scene_report import CHANCE
from fovlm.config.schema import load
from fovlm.data.packing import Sample, collate
from fovlm.model.autoregressive import autoregressive
from fovlm.model.build import build
from fovlm.prepare.job import Job, SceneSettings
from fovlm.prepare.pipeline import prepare
from fovlm.train.losses import per_sample
from helpers.raw_data import stamps_and_films

ENCODER = (
    "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, mlp_ratio: 2, image_size: 126, patch_size: 14"
)
TINY = [
    f"model.encoder={ENCODER}, initializer_range: 0.1}}",
    "train.steps=3",
    "train.eval_every=2",
]


ONE, SCENES, FILM = ("scenes_one", 1, "1", 1), ("scenes", 3, "1,3,9", 1), ("film", 3, "1,3,9", 3)


def draw(raw, folder, counts):
    """The scenes of experiments/scenes.yaml and scenes_film.yaml: `counts` of ONE, SCENES, FILM and validation."""
    train = zip((ONE, SCENES, FILM), counts[:3], strict=True)
    val = [((f"scenes_val{n}", 3, str(n), 1), counts[3]) for n in (1, 2, 4, 6, 9)]
    val += [((f"film_val{n}", 3, str(n), 3), counts[3]) for n in (1, 3, 9)]
    for (name, grid, objects, frames), count in [*train, *val]:
        split = "val" if "_val" in name else "train"
        drawn = SceneSettings(count, objects, grid, frames, held_out=split == "val")
        prepare(Job("scenes", raw, folder / name, split, size=126, scenes=drawn), 1, lambda line: None)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Small sets of scenes."""
    draw(stamps_and_films(tmp_path), tmp_path / "data", (6, 6, 6, 6))
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path / "data"))
    return tmp_path


RUNS = ["scenes", "scenes_static", "scenes_after", "scenes_pooled", "scenes_shallow", "film", "film_static", "trained"]


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_losses_are_those_of_the_model(data, name):
    experiment = load(name, TINY)
    torch.manual_seed(1)
    model = build(experiment.model).eval()
    scenes = Scenes(experiment, model, data)
    asked = scenes.questions[experiment.data.val[-1]][:12]
    frames = asked[0].frames
    clips = [scenes.frames(q.source, list(range(q.picture, q.picture + frames))) for q in asked]
    samples = [Sample("", "", clip, frames, q.tokens, q.weight, q.prompt) for q, clip in zip(asked, clips, strict=True)]
    batch = collate(samples, experiment.model.frame_size, model.config.tokens_per_look)
    (stored,), looks = scenes.batches(asked), Looks(model)
    near = {"rtol": 0.01, "atol": 0.01}
    for rounds in (1, 2) if frames > 1 and model.config.visual == "foveated" else (1,):
        model.config.query_rounds = rounds
        expected = per_sample(model(batch), batch) / 2  # a name and its end
        torch.testing.assert_close(looks.nll(stored)[0], expected, **near)
    if frames > 1 and model.config.visual == "foveated":
        expected = per_sample(autoregressive(model, batch), batch) / 2
        torch.testing.assert_close(looks.nll(stored, rounds=frames)[0], expected, **near)
    nothing = [Sample("", "", clips[0][:0], 0, q.tokens, q.weight) for q in asked]
    texts = collate(nothing, experiment.model.frame_size, model.config.tokens_per_look)
    blind = looks.nll(stored | {"seen": stored["seen"][:, :0]})[0]
    torch.testing.assert_close(blind, per_sample(model(texts), texts) / 2, **near)
    if model.config.visual == "foveated":
        others = other_questions(stored)
        assert all(asked[n].picture != asked[m].picture for n, m in enumerate(others) if n != m)
        plain, foreign = looks.nll(stored)[0], looks.nll(stored, gaze_of=others)[0]
        changed = (foreign - plain).abs() > 1e-6
        if experiment.model.question == "before_frames":
            assert changed.tolist() == [n != m for n, m in enumerate(others)]
        else:  # a single frame's query is then the same for all
            assert not changed.any()


def test_gradients_of_a_trained_encoder_are_those_of_the_model(data):
    experiment = load("trained", TINY)
    torch.manual_seed(1)
    model = build(experiment.model).eval()
    scenes = Scenes(experiment, model, data)
    asked = scenes.questions["objects9"][:6]
    samples = [Sample("", "", scenes.frames(q.source, [q.picture]), 1, q.tokens, q.weight, q.prompt) for q in asked]
    found = []
    for losses in (
        lambda: per_sample(model(collate(samples, 126, 1)), collate(samples, 126, 1)) / 2,
        lambda: torch.cat([Looks(model).nll(batch)[0] for batch in scenes.batches(asked)]),
    ):
        model.zero_grad()
        losses().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99
    torch.testing.assert_close(found[1].norm(), found[0].norm(), rtol=0.01, atol=0)


def test_the_study_trains_scores_and_resumes(data, monkeypatch, capsys):
    monkeypatch.setattr(study, "load", lambda name, overrides: load(name, [*TINY, "data.first={one: 48}", *overrides]))
    monkeypatch.setattr(sys, "argv", ["scenes", str(data / "out"), "scenes", "scenes_static", "--seeds", "1"])
    study.main()
    result = json.loads((data / "out" / "scenes-s0.json").read_text())
    assert [row["step"] for row in result["curve"]] == [2, 3]
    for row in result["curve"][-1]["by_source"].values():
        assert 0 <= row["mass"] <= 1
        assert 0 < row["anywhere"] < 0.3
    assert len(result["outliers"]) == 2
    assert min(result["outliers"]) > 1
    assert set(result["controls"]) == {"blind", "foreign"}
    assert set(result["faithfulness"]) == {"as it is", "where it looks", "elsewhere"}
    assert (data / "out" / "scenes-s0.png").exists()
    monkeypatch.setattr(study, "run", None)  # nothing is trained again
    study.main()
    assert "scenes_static" in (data / "out" / "table.md").read_text()


def test_pointing_counts_patches_whose_center_is_in_the_box():
    grid = torch.zeros(2, 9, 9)
    grid[0, 4, 4], grid[0, 0, 0], grid[1, 0, 0] = 3, 1, 1
    found = pointing(grid, torch.tensor([[42, 42, 84, 84]] * 2), 126)
    assert found == {"pointing": [1, 0], "mass": [0.75, 0], "anywhere": [pytest.approx(1 / 9)] * 2}


def test_a_foreign_question_is_another_one_about_another_clip():
    tokens, clips = torch.tensor([[1, 2, 9], [1, 2, 8], [1, 2, 7], [3, 4, 6], [5, 6, 0]]), torch.tensor([0, 1, 2, 2, 0])
    batch = {"tokens": tokens, "clips": clips, "prompt": 2}
    assert other_questions(batch) == [3, 3, 4, 4, 1]
    assert other_questions(batch | {"prompt": 0}) == [1, 2, 4, 4, 1], "no question comes before the frames"
    assert other_questions({name: x if name == "prompt" else x[:3] for name, x in batch.items()}) == [0, 1, 2]


@pytest.mark.real
@pytest.mark.slow
def test_smoke_of_the_study(tmp_path, monkeypatch):
    """The study in ten minutes of one core: FOVLM_RAW with stamps/ and clips/, FOVLM_MODELS with dinov2-small."""
    draw(Path(os.environ["FOVLM_RAW"]), tmp_path / "data", (400, 1200, 150, 30))
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path / "data"))
    torch.set_num_threads(1)
    steered, static, film, rounds = (
        study.run(name, 0, steps, tmp_path)["curve"][-1]["by_source"]
        for name, steps in (("scenes", 450), ("scenes_static", 450), ("film", 120), ("film_rounds", 60))
    )
    assert steered["objects9"]["loss"] < static["objects9"]["loss"] - 0.2
    assert steered["objects9"]["pointing"] > 0.5
    assert film["film3"]["loss"] < CHANCE
    # Trained with one round alone, what is learned is lost when frames come one by one.
    assert abs(rounds["film3"]["deployed"] - rounds["film3"]["loss"]) < 0.3
