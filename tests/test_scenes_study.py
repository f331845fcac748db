"""The study's fast path computes what training computes, and repeats nothing."""

import json
import sys

import pytest
import torch

from benchmarks import scenes as study
from benchmarks.scene_gaze import pointing
from benchmarks.scene_looks import Looks, Scenes
from fovlm.config.schema import load
from fovlm.data.packing import Sample, collate
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
    "data.first={one: 48}",
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The sources of experiments/scenes.yaml, small."""
    raw = stamps_and_films(tmp_path)
    sets = {"scenes": (3, "1,3,9", False), "scenes_one": (1, "1", False)}
    sets |= {f"scenes_val{n}": (3, str(n), True) for n in (1, 2, 4, 6, 9)}
    for name, (grid, objects, held_out) in sets.items():
        job = Job("scenes", raw, tmp_path / "data" / name, "val" if held_out else "train", size=126)
        drawn = SceneSettings(6, objects, grid, held_out=held_out)
        prepare(Job(**{**vars(job), "scenes": drawn}), 1, lambda line: None)
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.parametrize("name", ["scenes", "scenes_static", "scenes_after", "scenes_pooled", "scenes_shallow"])
@torch.no_grad()
def test_losses_are_those_of_the_model(data, name):
    experiment = load(name, TINY)
    torch.manual_seed(1)
    model = build(experiment.model).eval()
    scenes = Scenes(experiment, model, data)
    asked = scenes.questions["objects9"][:12]
    nll, _, _ = Looks(model).nll(scenes.batch(asked), asked[0].prompt)
    samples = [
        Sample(str(n), "", scenes.frames(q.source, [q.picture]), 1, q.tokens, q.weight, q.prompt)
        for n, q in enumerate(asked)
    ]
    batch = collate(samples, experiment.model.frame_size, model.config.tokens_per_look)
    torch.testing.assert_close(nll, per_sample(model(batch), batch) / 2, rtol=0.01, atol=0.01)  # a name and its end


def test_the_study_trains_scores_and_resumes(data, monkeypatch, capsys):
    monkeypatch.setattr(study, "load", lambda name, overrides: load(name, [*TINY, *overrides]))
    monkeypatch.setattr(sys, "argv", ["scenes", str(data / "out"), "scenes", "scenes_static", "--seeds", "1"])
    study.main()
    result = json.loads((data / "out" / "scenes-s0.json").read_text())
    assert [row["step"] for row in result["curve"]] == [2, 3]
    for row in result["curve"][-1]["by_source"].values():
        assert 0 <= row["mass"] <= 1
        assert 0 < row["anywhere"] < 0.3
    assert set(result["faithfulness"]) == {"as it is", "where it looks", "elsewhere"}
    assert (data / "out" / "scenes-s0.png").exists()
    monkeypatch.setattr(study, "run", None)  # nothing is trained again
    study.main()
    assert "scenes_static" in (data / "out" / "table.md").read_text()


def test_pointing_counts_patches_whose_center_is_in_the_box():
    grid = torch.zeros(2, 9, 9)
    grid[0, 4, 4], grid[0, 0, 0], grid[1, 0, 0] = 3, 1, 1
    found = pointing(grid, [[42, 42, 84, 84], [42, 42, 84, 84]], 126)
    assert found == {"pointing": [1, 0], "mass": [0.75, 0], "anywhere": [pytest.approx(1 / 9)] * 2}


@pytest.mark.real
@pytest.mark.slow
def test_a_real_encoder_is_steered_to_the_asked_picture(tmp_path):
    """FOVLM_DATA with the scenes of docs/evidence.md, FOVLM_MODELS with dinov2-small; some six minutes of one core."""
    last = study.run("scenes", 0, None, tmp_path)["curve"][-1]["by_source"]["objects9"]
    assert last["loss"] < 1.0, "a static query stays at 1.38"
    assert last["pointing"] > 0.8
