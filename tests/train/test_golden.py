"""Twenty steps of each way to train a tiny model, held to the losses in tests/golden/. All in one process.

To renew them after a change that is meant to change them: FOVLM_GOLDEN=write pytest tests/train/test_golden.py
"""

import math
import os

import pytest

from helpers.recorded_runs import record
from helpers.training import STEPS, arguments, assert_golden, write_data, write_golden

QUICK = ["data.workers=0", "data.val=[]", "train.eval_every=0", "train.best=train_loss", "train.save_every=0"]
PICTURES = ["data.mixture={pictures: 86, words: 14}", "data.image_frames=4"]
WAYS = {
    "video": [],
    "coarse": ["model.visual=coarse"],
    "multi_token": ["model.visual=multi_token"],
    "qwen3_dinov3": [
        "model.llm.model_type=qwen3",
        "model.encoder={model_type: dinov3_vit, hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, "
        "intermediate_size: 64, image_size: 28, patch_size: 7, num_register_tokens: 2}",
        "model.visual_scale=null",
    ],
    "pictures": PICTURES,
    "dpo": ["data.mixture={pairs: 1}", "train.objective=dpo", "model.question=before_frames", "data.image_frames=2"],
}
HUNT = ["data.generate.folder=golden", "data.generate.train_clips=200", "data.generate.val_clips=4"]
SOURCES = {"video": "golden/video-000.tar", "image": "golden/image-000.tar", "words": "golden/text-000.tar"}


def quickstart() -> list[str]:
    """The run of that name, with its own model, question and rounds, on less data in smaller steps."""
    shards = [f"data.sources.{name}.shards={file}" for name, file in SOURCES.items()]
    return ["quickstart", *HUNT, *shards, f"train.steps={STEPS}", "train.packs_per_step=2", "logger.wandb=disabled"]


@pytest.fixture(scope="module")
def trained(forked, tmp_path_factory) -> dict[str, dict]:
    home = write_data(tmp_path_factory.mktemp("golden"))
    runs = {name: {"arguments": [*arguments(home, name, *way), *QUICK]} for name, way in WAYS.items()}
    runs["quickstart"] = {"arguments": [*quickstart(), *QUICK]}
    return record(forked, home, runs)


@pytest.mark.parametrize("name", [*WAYS, "quickstart"])
def test_losses_are_the_golden_ones(trained, name):
    run = trained[name]
    assert run["status"] == 0, run["said"]
    if os.environ.get("FOVLM_GOLDEN") == "write":
        write_golden(name, run["losses"])
    assert_golden(name, run["losses"])
    assert run["losses"][-1] < 0.9 * run["losses"][0], "and it learns"


def test_preferences_start_from_a_model_like_its_reference(trained):
    """Neither answer is preferred before the first step, so that its loss is log 2."""
    assert math.isclose(trained["dpo"]["losses"][0], math.log(2), rel_tol=1e-6)
    assert trained["dpo"]["parts"][-1]["preferred"] > 0.9
