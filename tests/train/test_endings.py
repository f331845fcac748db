"""How a run ends that should not go on: too many broken samples, steps that are not finite, a rank that hangs."""

import json
import re

import pytest

from helpers.launch import run_ranks
from helpers.training import arguments, environment, rows, write_data

QUIET = ["data.workers=0", "data.val=[]", "train.eval_every=0", "train.best=train_loss", "train.save_every=0"]
RUNS = {
    "broken": {"arguments": ["data.mixture={broken: 1}", "data.max_bad_fraction=0.002", "train.log_every=2"]},
    "broken but few": {"arguments": ["data.mixture={broken: 1}", "data.max_bad_fraction=0.05", "train.steps=2"]},
    "not finite": {"arguments": ["train.max_nonfinite=3"], "spoilt": [2, 3, 5, 6, 7, 8]},
    "not finite now and then": {"arguments": ["train.max_nonfinite=3", "train.steps=6"], "spoilt": [2, 3, 5, 6]},
}
# Minutes pass like seconds, and every step takes 0.6 s; on one rank the sixth never ends. Rank 0 is slow to print, as
# on a busy machine: no other rank may end before.
HUNG = """
import os, sys, time
from fovlm.train import trainer as train
from fovlm.train.engine import Engine

step, steps, init, exchange = Engine.step, [], train.Watchdog.__init__, train.Watchdog._exchange

def stuck(engine, batches):
    steps.append(1)
    time.sleep(90 if len(steps) == 6 and os.environ["RANK"] == "1" else 0.6)
    return step(engine, batches)

def slow(*arguments):
    answers = exchange(*arguments)
    time.sleep(1 if os.environ["RANK"] == "0" else 0)
    return answers

Engine.step, train.Watchdog._exchange = stuck, slow
train.Watchdog.__init__ = lambda watchdog, seconds: init(watchdog, seconds / 60)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("endings"))


@pytest.fixture(scope="module")
def ended(home) -> dict[str, dict]:
    runs = {
        name: run | {"arguments": arguments(home, name.replace(" ", "-"), *QUIET, *run["arguments"])}
        for name, run in RUNS.items()
    }
    (home / "runs.json").write_text(json.dumps(runs))
    run_ranks(1, ["-m", "helpers.recorded_runs", str(home / "runs.json"), str(home / "found.json")], environment(home))
    return json.loads((home / "found.json").read_text())


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


def test_a_step_that_hangs_ends_a_run_and_the_rank_is_named(home):
    command = ["-c", HUNG, *arguments(home, "hung", *QUIET, "train.hang_minutes=5")]
    output = run_ranks(2, command, environment(home), status=1)
    assert re.search(r"fovlm: rank 0 on \S+ waits for the others\n", output)
    assert re.search(r"fovlm: rank 1 on \S+ hangs in stuck \(<string>:\d+\)\n", output)
    assert "a step took longer than" in output
    assert len(rows(home, "hung")) == 5, "the limit is for one step, not for all of them together"
