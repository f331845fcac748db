"""How a run ends that should not go on: too many broken samples, steps that are not finite, a rank that hangs."""

import re

import pytest

from helpers.recorded_runs import record
from helpers.training import arguments, environment, rows, write_data

QUIET = ["data.workers=0", "data.val=[]", "train.eval_every=0", "train.best=train_loss", "train.save_every=0"]
RUNS = {
    "broken": {"arguments": ["data.mixture={broken: 1}", "data.max_bad_fraction=0.002", "train.log_every=2"]},
    "broken but few": {"arguments": ["data.mixture={broken: 1}", "data.max_bad_fraction=0.05", "train.steps=2"]},
    "not finite": {"arguments": ["train.max_nonfinite=3"], "spoilt": [2, 3, 5, 6, 7, 8]},
    "not finite now and then": {"arguments": ["train.max_nonfinite=3", "train.steps=6"], "spoilt": [2, 3, 5, 6]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("endings"))


@pytest.fixture(scope="module")
def ended(forked, home) -> dict[str, dict]:
    runs = {
        name: run | {"arguments": arguments(home, name.replace(" ", "-"), *QUIET, *run["arguments"])}
        for name, run in RUNS.items()
    }
    return record(forked, home, runs)


def test_too_many_broken_samples_end_a_run(ended, home):
    run = ended["broken"]
    assert run["status"] == 2
    assert run["said"].count("\n") == 1
    assert "samples were broken" in run["said"]
    assert "more than data.max_bad_fraction=0.002 allows" in run["said"]
    row = rows(home, "broken")[-1]
    (count,) = [value for cause, value in row.items() if cause.startswith("bad/broken/")]
    assert f"{count} of {row['samples']} samples were broken ({count} x broken: " in run["said"]
    assert count > 0.002 * 1000, "among few samples, one alone ends no run"
    named = [line for line in (home / "runs" / "broken" / "log.txt").read_text().splitlines() if "is replaced" in line]
    assert len(named) == count


def test_broken_samples_end_no_run_while_they_are_few(ended):
    """A quarter is broken and the limit is 5 %, but of a thousand samples at least."""
    assert (ended["broken but few"]["status"], len(ended["broken but few"]["losses"])) == (0, 2)


def test_steps_in_a_row_that_are_not_finite_end_a_run(ended, home):
    run = ended["not finite"]
    assert run["status"] == 2
    assert "fovlm: 3 steps in a row were not finite" in run["said"]
    assert len(run["losses"]) == 7, "two in a row, a good one, and three in a row"
    log = (home / "runs" / "not-finite" / "log.txt").read_text()
    assert log.count("rank 0: the loss is nan for samples ['") >= 5


def test_steps_that_are_not_finite_now_and_then_end_no_run(ended):
    run = ended["not finite now and then"]
    assert run["status"] == 0
    assert len(run["losses"]) == 6
    assert run["losses"][3] == run["losses"][3], "the step between them is a number"


def test_a_step_that_hangs_ends_a_run_and_the_rank_is_named(forked, home):
    words = arguments(home, "hung", *QUIET, "train.hang_minutes=5")
    output = forked.run(2, words, environment(home), status=1, hook="helpers.disk_faults:hang")
    assert re.search(r"fovlm: rank 0 on \S+ waits for the others\n", output)
    assert re.search(r"fovlm: rank 1 on \S+ hangs in stuck \(\S+disk_faults.py:\d+\)\n", output)
    assert "a step took longer than" in output
    assert len(rows(home, "hung")) == 5, "the limit is for one step, not for all of them together"
