"""Real weights and real pictures: `make real`. Wants FOVLM_MODELS with SmolLM2-135M-Instruct and dinov2-small, and
FOVLM_DATA with what `scripts/real_shards.py RAW $FOVLM_DATA/real` makes. About 25 minutes on two cores."""

import os
import signal
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from fovlm.checkpoint.run_folder import Row, read_metrics
from fovlm.config.schema import ModelSettings, load
from fovlm.data.chat import load_tokenizer
from fovlm.data.dataset import open_dataset
from fovlm.data.packing import collate
from fovlm.model.build import build, find_weights
from fovlm.model.modeling import FoveatedVLM
from helpers import ROOT
from helpers.models import outcomes, pixels, sample

pytestmark = [pytest.mark.real, pytest.mark.slow]
LLM, DINO = "HuggingFaceTB/SmolLM2-135M-Instruct", "facebook/dinov2-small"


@pytest.fixture(scope="module")
def model() -> FoveatedVLM:
    torch.manual_seed(0)
    return build(ModelSettings(llm=LLM, encoder=DINO))


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """Eight frames u8 of a real clip."""
    experiment = load("LR1-real")
    data = open_dataset(experiment, load_tokenizer(find_weights(LLM)), {"clips": 1.0})
    return data.read(0)[0][0].frames


def test_encode_equals_the_forward_of_hugging_face(model, frames):
    with torch.no_grad():
        expected = model.encoder.backbone(pixels(frames)).last_hidden_state
        torch.testing.assert_close(model.encoder.features(frames), expected, rtol=1e-4, atol=1e-4)
        row = model.connector.query_in(model.connector.q_static)
        cache, riding = model.encoder.encode(frames, row)
        torch.testing.assert_close(riding, model.encoder.look(row.expand(8, -1), cache), rtol=1e-3, atol=1e-3)


def test_a_text_alone_scores_as_the_language_model_alone(model):
    text = replace(sample("text", text=40), frames=torch.zeros(0, 3, 224, 224, dtype=torch.uint8))
    llm = AutoModelForCausalLM.from_pretrained(find_weights(LLM), dtype=torch.float32)
    with torch.no_grad():
        nll = model(collate([text], 224))
        logits = llm(text.tokens[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], text.tokens[1:], reduction="none")
    torch.testing.assert_close(nll[1:], expected, rtol=1e-4, atol=1e-4)


def test_deep_queries_differ_and_shallow_or_narrow_ones_do_not(model, frames):
    """Seen with this DINOv2: correlation 0.43 deep, 0.63 shallow, 0.98 deep at a deviation of 0.02."""
    deep, _ = outcomes(model, frames=frames)
    narrow, _ = outcomes(model, std=0.02, frames=frames)
    model.encoder.deep = False
    shallow, flat = outcomes(model, std=0.02, frames=frames)
    model.encoder.deep = True
    assert deep < 0.6
    assert narrow > 0.9
    assert shallow > 0.98
    assert flat > 0.999, "attention is uniform"


def test_lr1_learns_and_resumes_exactly_after_a_kill(tmp_path):
    """100 steps in bf16; one rank is killed between two checkpoints, and the same command resumes from the last."""
    command = ["./launch.sh", "LR1-real", "train.precision=bf16", "model.frame_size=112"]
    env = {**os.environ, "FOVLM_RUNS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}

    def rows() -> list[Row]:
        return read_metrics(tmp_path / "LR1-real")

    started = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    while len(rows()) < 33:
        assert started.poll() is None
        time.sleep(1)
    # Of this run alone, as others may train here too; and a rank, not the launcher above it.
    ours = [process.as_dict(["pid", "cmdline"]) for process in psutil.Process(started.pid).children(recursive=True)]
    os.kill(next(p["pid"] for p in ours if (p["cmdline"] or [])[2:4] == ["-m", "fovlm.train"]), signal.SIGKILL)
    _, said = started.communicate()
    assert started.returncode
    assert "a rank was killed by signal 9" in said.strip().splitlines()[-1]
    before = rows()
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    after = rows()
    assert len(after) == 100
    for was, now in zip(before, after, strict=False):
        assert (was["step"], was["loss"], was["samples"]) == (now["step"], now["loss"], now["samples"])
    losses = [row["loss"] for row in after]
    assert statistics.mean(losses[-20:]) < 0.95 * statistics.mean(losses[:20])
    assert statistics.mean(abs(row["fine_over_coarse"] - 1) for row in after) > 0.01, "fine and coarse differ"
    assert Path(tmp_path / "LR1-real" / "run_summary.json").exists()
