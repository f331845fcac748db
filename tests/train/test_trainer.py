"""`python -m fovlm.train` from shards to a finished run: golden losses, a kill and a resume on fewer ranks, a signal.

One start, that of the signal, is that of a user; the others are forked.
"""

import json
import math
import signal
import time
from pathlib import Path

import pytest

from fovlm.checkpoint.run_folder import Row
from helpers.launch import start_ranks
from helpers.training import STEPS, arguments, assert_golden, environment, rows, write_data

LOGGED = """loss_fine loss_coarse fine_over_coarse grad_norm lr_connector lr_encoder lr_llm attention_entropy
samples_per_second tokens_per_second waiting memory_gb val_loss"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(forked, home) -> tuple[str, list[Row]]:
    """An uninterrupted run on two ranks: what it printed, and its rows."""
    output = forked.run(2, arguments(home, "whole"), environment(home))
    return output, rows(home, "whole")


def test_losses_are_the_golden_ones(whole):
    """On two ranks as on one: tests/train/test_golden.py writes and reads the same."""
    losses = [row["loss"] for row in whole[1]]
    assert_golden("video", losses)
    assert losses[-1] < 0.9 * losses[0], "and it learns"


def test_the_run_folder_has_everything(whole, home):
    folder = home / "runs" / "whole"
    summary = json.loads((folder / "run_summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["step"] == STEPS
    assert set(summary["scores"]) == {"coarse_only", "coarse_fine", "autoregressive"}
    assert (summary["ranks"], summary["device"], whole[1][-1]["progress"]) == (2, "cpu", 1.0)
    assert summary["flops"] > summary["samples"] * 1e6
    assert summary["val_samples"] > 4
    assert (folder / "experiment.yaml").exists()
    assert (folder / "deepspeed.json").exists()
    assert (folder / "maps" / f"step-{STEPS:08d}.png").stat().st_size > 1000
    row = whole[1][-1]
    for key in LOGGED.split():
        assert math.isfinite(row[key]), key
    assert "autoregressive" in whole[0]
    assert "run folder" in whole[0]
    assert not [word for word in ("Traceback", "Warning") if word in whole[0]], whole[0]


def test_a_broken_sample_is_counted_and_named(whole, home):
    row = whole[1][-1]
    (cause,) = [key for key in row if key.startswith("bad/")]
    assert cause.startswith("bad/broken/")
    named = [line for line in (home / "runs" / "whole" / "log.txt").read_text().splitlines() if "is replaced" in line]
    assert len(named) == row[cause] > 1
    assert "sample p2 in broken-00.tar" in named[0]


def test_a_killed_run_resumes_exactly_on_another_number_of_ranks(forked, whole, home):
    words = arguments(home, "killed", "data.workers=0")
    ranks = forked.start(2, words, environment(home))
    until(lambda: len(rows(home, "killed")) >= 7)
    ranks.kill()  # at once, in the middle of a step
    ranks.wait()
    stopped = len(rows(home, "killed"))
    assert stopped < STEPS
    output = forked.run(1, words, environment(home))
    assert "resuming from step-0000" in output
    again = rows(home, "killed")
    assert [row["samples"] for row in again] == [row["samples"] for row in whole[1]]
    for row, expected in zip(again, whole[1], strict=True):
        assert math.isclose(row["loss"], expected["loss"], rel_tol=5e-6), row["step"]
    one, two = (json.loads((home / "runs" / name / "run_summary.json").read_text()) for name in ("killed", "whole"))
    assert one["val_hash"] == two["val_hash"]
    assert not (home / "runs" / "killed" / "universal").exists(), "it was made for the resume alone"


def test_a_signal_saves_within_a_step_and_a_stranger_is_refused(forked, home):
    command = ["-m", "fovlm.train", *arguments(home, "signalled", "data.workers=0")]
    (process,) = start_ranks(1, command, environment(home))
    until(lambda: len(rows(home, "signalled")) >= 2)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert not [word for word in ("Traceback", "Warning") if word in output], output
    latest = (home / "runs" / "signalled" / "checkpoints" / "latest").read_text().strip()
    saved = json.loads((home / "runs" / "signalled" / "checkpoints" / latest / "state.json").read_text())
    assert saved["step"] == len(rows(home, "signalled"))
    # The same run folder with another rate is another experiment.
    output = forked.run(1, arguments(home, "signalled", "optim.lr_llm=1e-3"), environment(home), status=2)
    assert output.strip().count("\n") == 0
    assert "another experiment" in output
    assert "name=" in output


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
