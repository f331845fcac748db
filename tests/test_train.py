"""`python -m fovlm.train` from shards to a finished run: golden losses, a kill and a resume on fewer ranks, a signal.

A start of two ranks takes some 15 s, so three starts serve all checks.
"""

import csv
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from fovlm.shards import write_shards
from helpers import ROOT, tiny
from helpers.launch import run_ranks, start_ranks

GOLDEN = ROOT / "tests" / "golden" / "losses.csv"
STEPS = 20
LOGGED = """loss_fine loss_coarse fine_over_coarse grad_norm lr_connector lr_dino lr_llm attention_entropy
samples_per_second tokens_per_second waiting memory_gb val_loss"""
SETTINGS = [
    "data.sources={video: {kind: video, shards: 'video-{00..07}.tar'}, "
    "words: {kind: text, shards: 'words-{00..01}.tar'}, broken: {kind: image, shards: 'broken-00.tar'}}",
    "data.train={video: 80, words: 14, broken: 6}",
    *("data.val=[video]", "data.frames=12", "data.text=200", "data.max_frames=4", "data.max_text=48", "data.workers=1"),
    "model.llm={vocab_size: 64, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, tie_word_embeddings: true}",
    "model.dino={hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, image_size: 28, patch_size: 7}",
    *(
        "model.frame_size=28",
        "model.query_dim=24",
        "optim.lr_connector=2e-3",
        "optim.lr_dino=1e-3",
        "optim.lr_llm=4e-3",
    ),
    *(
        f"train.steps={STEPS}",
        "train.packs_per_step=4",
        "train.log_every=1",
        "train.eval_every=10",
        "train.eval_packs=4",
    ),
    *("train.save_every=5", "journal.wandb=disabled"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    tiny.clips(folder, "video", [3, 4, 2, 4, 3] * 8)
    tiny.clips(folder, "words", [0] * 10)
    pictures = [tiny.clip(f"p{i}", 1) for i in range(4)]
    pictures[2]["000.jpg"] = b"\xff\xd8 no picture"
    renamed = [{("jpg" if k == "000.jpg" else k): v for k, v in picture.items()} for picture in pictures]
    write_shards(folder / "broken-%02d.tar", renamed)
    return folder


def command(home: Path, name: str, *more: str) -> list[str]:
    return ["-m", "fovlm.train", "LR1", *SETTINGS, f"model.tokenizer={home / 'tokenizer'}", f"name={name}", *more]


def env(home: Path) -> dict[str, str]:
    return {"FOVLM_DATA": str(home), "FOVLM_RUNS": str(home / "runs"), "FOVLM_CACHE": str(home / "cache")}


def rows(home: Path, name: str) -> list[dict[str, str]]:
    file = home / "runs" / name / "metrics.csv"
    return list(csv.DictReader(file.open())) if file.exists() else []


@pytest.fixture(scope="module")
def whole(home) -> tuple[str, list[dict[str, str]]]:
    """An uninterrupted run on two ranks: what it printed, and its rows."""
    output = run_ranks(2, command(home, "whole"), env(home))
    return output, rows(home, "whole")


def test_losses_are_the_golden_ones(whole):
    """To renew after a change that is meant to change them: FOVLM_GOLDEN=write pytest tests/test_train.py"""
    losses = [(row["step"], row["loss"]) for row in whole[1]]
    if os.environ.get("FOVLM_GOLDEN") == "write":
        GOLDEN.write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in losses))
    golden = list(csv.DictReader(GOLDEN.open()))
    assert len(losses) == len(golden) == STEPS
    for (step, loss), row in zip(losses, golden, strict=True):
        assert step == row["step"]
        assert math.isclose(float(loss), float(row["loss"]), rel_tol=1e-3)
    assert float(losses[-1][1]) < 0.9 * float(losses[0][1]), "and it learns"


def test_the_run_folder_tells_everything(whole, home):
    folder = home / "runs" / "whole"
    summary = json.loads((folder / "run_summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["step"] == STEPS
    assert set(summary["scores"]) == {"coarse_only", "coarse_fine", "autoregressive"}
    assert (summary["ranks"], summary["device"], float(whole[1][-1]["progress"])) == (2, "cpu", 1.0)
    assert summary["flops"] > summary["samples"] * 1e6
    assert summary["val_samples"] > 4
    assert (folder / "experiment.yaml").exists()
    assert (folder / "deepspeed.json").exists()
    assert (folder / "maps" / f"step-{STEPS:08d}.png").stat().st_size > 1000
    row = whole[1][-1]
    for key in LOGGED.split():
        assert math.isfinite(float(row[key])), key
    assert "autoregressive" in whole[0]
    assert "run folder" in whole[0]
    assert not [word for word in ("Traceback", "Warning") if word in whole[0]], whole[0]


def test_a_broken_sample_is_counted_and_named(whole, home):
    row = whole[1][-1]
    (cause,) = [key for key in row if key.startswith("bad/")]
    assert cause.startswith("bad/broken/")
    named = [line for line in (home / "runs" / "whole" / "log.txt").read_text().splitlines() if "is replaced" in line]
    assert len(named) == int(row[cause]) > 1
    assert "sample p2 in broken-00.tar" in named[0]


def test_a_killed_run_goes_on_exactly_on_another_number_of_ranks(whole, home):
    processes = start_ranks(2, command(home, "killed", "data.workers=0"), env(home))
    until(lambda: len(rows(home, "killed")) >= 7)
    for process in processes:  # at once, in the middle of a step
        process.kill()
    for process in processes:
        process.wait()
    stopped = len(rows(home, "killed"))
    assert stopped < STEPS
    output = run_ranks(1, command(home, "killed", "data.workers=0"), env(home))
    assert "going on from step-0000" in output
    again = rows(home, "killed")
    assert [row["samples"] for row in again] == [row["samples"] for row in whole[1]]
    for row, expected in zip(again, whole[1], strict=True):
        assert math.isclose(float(row["loss"]), float(expected["loss"]), rel_tol=5e-6), row["step"]
    one, two = (json.loads((home / "runs" / name / "run_summary.json").read_text()) for name in ("killed", "whole"))
    assert one["val_hash"] == two["val_hash"]


def test_a_signal_saves_within_a_step_and_a_stranger_is_refused(whole, home):
    (process,) = start_ranks(1, command(home, "signalled", "data.workers=0"), env(home))
    until(lambda: len(rows(home, "signalled")) >= 2)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    latest = (home / "runs" / "signalled" / "checkpoints" / "latest").read_text().strip()
    saved = json.loads((home / "runs" / "signalled" / "checkpoints" / latest / "state.json").read_text())
    assert saved["step"] == len(rows(home, "signalled"))
    # The same run folder with another rate is another experiment.
    output = run_ranks(1, command(home, "signalled", "optim.lr_llm=1e-3"), env(home), status=2)
    assert output.strip().count("\n") == 0
    assert "another experiment" in output
    assert "name=" in output


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
