"""Many runs: in which place, and what becomes of them. A script stands in for launch.sh."""

import json
import os
import signal
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest

from fovlm.errors import EXIT_STOPPED, UserError
from fovlm.sweep import table
from fovlm.sweep.progress import SweepProgress
from fovlm.sweep.runner import LOG, Slot, SweepRunner, cpu_slots, exit_status, gpu_slots
from fovlm.sweep.select import plan, run_status, select
from helpers.launch import RECORDER

# Plays a run: writes what train.py writes. behave.json tells how each run ends; events.txt what happened.
LAUNCHER = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
home = Path({home!r})
words = dict(word.split("=", 1) for word in sys.argv[2:])
name = words.get("name", sys.argv[1])
how = json.loads((home / "behave.json").read_text()).get(name, "ok")
folder = home / "runs" / name

def event(what):
    with (home / "events.txt").open("a") as f:
        f.write(what + " " + name + "\\n")

def end(status, code):
    facts = {{"status": status, "experiment_hash": json.loads((home / "hashes.json").read_text())[name],
              "final": {{"val_loss": 0.5, "val_loss_coarse_fine": 0.5}}, "samples": 100, "flops": 2e9, "ranks": 1,
              "device": "cpu", "wall_seconds": 4.0, "val_hash": "v", "commit": "c", "data_hash": "d"}}
    (folder / "run_summary.json").write_text(json.dumps(facts))
    event(status)
    sys.exit(code)

(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "asked.json").write_text(json.dumps([sys.argv[1:], {{k: v for k, v in os.environ.items()}}]))
for n in (1, 2):
    row = {{"step": n, "seconds": n, "samples": 50 * n, "samples_per_second": 10 + 10 * n, "progress": n / 2}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: end("stopped", 75))
signal.signal(signal.SIGINT, lambda *_: end("stopped", 75))
event("start")
print("training", name)
if how == "fail":
    print("it broke here")
    sys.exit(3)
if how == "meet":
    until = time.monotonic() + 20
    while (home / "events.txt").read_text().count("start") < 2 and time.monotonic() < until:
        time.sleep(0.02)
if how == "wait":
    signal.pause()
end("finished", 0)
"""
EXPERIMENTS = """
model: {tokenizer: t}
data: {sources: {x: {kind: text, shards: x.tar}, v: {kind: text, shards: v.tar}}, mixture: {x: 1}, val: [v]}
train: {steps: 10}
runs:
  two: {note: first in its file}
  one: {note: second}
  next: {note: starts from two, model: {init_from: two}}
"""


class Place:
    """A folder of runs, experiments of its own, and the stand-in."""

    def __init__(self, home: Path):
        self.home = home
        (home / "experiments").mkdir()
        (home / "experiments" / "trio.yaml").write_text(EXPERIMENTS)
        self.launcher = home / "launch"
        self.launcher.write_text(LAUNCHER.format(python=sys.executable, home=str(home)))
        self.launcher.chmod(0o755)
        self.behave()

    def behave(self, **how: str) -> None:
        (self.home / "behave.json").write_text(json.dumps(how))

    def work(self, *words: str, seeds: int = 1, slots: list[Slot] | None = None, again: bool = False):
        """What `fovlm sweep WORDS` does: the results, the exit status, and what was said."""
        overrides, folder = [w for w in words if "=" in w], self.home / "experiments"
        planned = plan(select([w for w in words if "=" not in w], folder=folder), overrides, seeds, folder)
        (self.home / "hashes.json").write_text(json.dumps({run.name: run.experiment.hash for run in planned}))
        said = StringIO()
        with SweepProgress(len(planned), said) as progress:
            results = SweepRunner(planned, slots or [Slot()], progress, [self.launcher]).work(again)
        status = exit_status(results, planned, progress.say)
        return results, status, said.getvalue()

    def events(self) -> list[str]:
        """What happened since the last call."""
        file = self.home / "events.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def table(self) -> dict[str, dict[str, str]]:
        return table.read(self.home / "runs")

    def asked(self, name: str) -> tuple[list[str], dict[str, str]]:
        """The words and the environment of a run."""
        words, env = json.loads((self.home / "runs" / name / "asked.json").read_text())
        return words, env


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Place(tmp_path)


def test_one_after_another_and_what_is_finished_is_skipped(place):
    results, status, said = place.work("trio/*")
    assert (results, status) == ({"two": "finished", "one": "finished", "next": "finished"}, 0)
    assert place.events() == ["start two", "finished two", "start one", "finished one", "start next", "finished next"]
    assert "[3/3] next: finished in 0:0" in said
    results, status, said = place.work("trio/*")
    assert (set(results.values()), status, place.events()) == ({"finished"}, 0, [])
    assert "finished already" in said


def test_runs_that_wait_for_one_another_are_reported_before_anything_runs(place):
    file = place.home / "experiments" / "trio.yaml"
    file.write_text(file.read_text().replace("first in its file", "starts from next, model: {init_from: next}"))
    with pytest.raises(UserError, match="in a circle: two, which starts from next, which starts from two;"):
        place.work("one", "two", "next")
    assert place.work("one")[1] == 0, "without the circle"


def test_the_table_has_a_row_for_each(place):
    place.behave(one="fail")
    place.work("two", "one", "train.seed=4")
    two, one = place.table()["two"], place.table()["one"]
    assert (two["status"], two["group"], two["seed"], two["samples"]) == ("finished", "trio", "4", "100")
    assert (two["val_loss_coarse_fine"], two["val_hash"], two["commit"]) == ("0.5", "v", "c")
    assert (one["status"], one["val_loss"], one["step"]) == ("failed", "", "2")
    assert float(two["samples_per_second"]) == 25
    assert two["started"] <= two["ended"]
    place.behave()
    place.work("one", "train.seed=4")
    assert (place.table()["one"]["status"], place.table()["two"]) == ("finished", two)


def test_a_failure_is_reported_with_the_end_of_its_log_and_the_rest_is_done(place):
    place.behave(two="fail")
    results, status, said = place.work("trio/*")
    assert (results, status) == ({"two": "failed", "one": "finished", "next": "blocked"}, 1)
    assert "FAILED" in said
    assert "    it broke here\n" in said
    assert "next: not started: it starts from two" in said
    assert "failed: two\n" in said
    assert "1 of 3 finished" in said
    assert "training two" in (place.home / "runs" / "two" / LOG).read_text()
    place.events()
    place.behave()
    assert place.work("trio/*")[1] == 0
    assert [e for e in place.events() if e.startswith("start")] == ["start two", "start next"]


def test_other_settings_are_refused_unless_asked_for(place):
    place.work("two")
    place.events()
    results, status, said = place.work("two", "one", "train.steps=20")
    assert (results, status) == ({"two": "stale", "one": "finished"}, 1)
    assert "under other settings" in said
    assert "--again" in said
    results, status, _ = place.work("two", "one", "train.steps=20", again=True)
    assert (results["two"], status) == ("finished", 0)
    assert place.events() == ["start one", "finished one", "start two", "finished two"]
    (old,) = (place.home / "runs" / "old").iterdir()
    assert old.name.startswith("two-")
    assert (old / "run_summary.json").exists()


def test_a_run_folder_is_known_by_its_settings_and_not_by_how_it_was_run(place):
    folder = place.home / "experiments"
    (run,) = plan([("trio", "two")], [], folder=folder)
    (other,) = plan([("trio", "two")], ["optim.clip=0.5"], folder=folder)
    (logged,) = plan([("trio", "two")], ["train.log_every=3", "data.workers=0"], folder=folder)
    assert run_status(run) == "new"
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "experiment.yaml").write_text(logged.experiment.dump())
    assert (run_status(run), run_status(logged), run_status(other)) == ("resumable", "resumable", "stale")
    (run.folder / "run_summary.json").write_text('{"status": "finished", "final": {}}')
    assert (run_status(run), run_status(other)) == ("finished", "stale")


def when_started(place: Place, count: int, number: int) -> threading.Thread:
    """Sends this process a signal when so many runs have started."""

    def wait() -> None:
        file, until = place.home / "events.txt", time.monotonic() + 30
        while time.monotonic() < until and not (file.exists() and file.read_text().count("start") >= count):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_run_and_the_same_command_resumes(place, number):
    place.behave(two="wait", one="wait")
    before = signal.getsignal(number)
    thread = when_started(place, 2, number)
    results, status, said = place.work("trio/*", slots=cpu_slots(2, 1))
    thread.join()
    assert (results, status) == ({"two": "stopped", "one": "stopped"}, EXIT_STOPPED)
    assert sorted(place.events()) == ["start one", "start two", "stopped one", "stopped two"]
    assert "saving, then stopping" in said
    assert "not started: next" in said
    assert place.table()["two"]["status"] == "stopped"
    assert signal.getsignal(number) is before
    began = place.table()["two"]["started"]
    place.behave()
    _, status, said = place.work("trio/*")
    assert (status, place.table()["two"]["started"]) == (0, began)
    assert "two resumes" in said
    assert "next starts" in said


def test_two_at_a_time_have_ports_and_threads_of_their_own(place):
    place.behave(two="meet", one="meet")
    _, status, _ = place.work("two", "one", slots=cpu_slots(2, 1))
    assert (status, place.events()[:2]) in ((0, ["start two", "start one"]), (0, ["start one", "start two"]))
    envs = [place.asked(name)[1] for name in ("two", "one")]
    assert envs[0]["MASTER_PORT"] != envs[1]["MASTER_PORT"]
    for env in envs:
        assert (env["NUM_GPUS"], env["CPU_RANKS"], env["FOVLM_PYTHON"]) == ("0", "1", sys.executable)
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_what_another_command_is_at_is_left_to_it(place):
    place.behave(two="wait")
    inner: list = []

    def beside() -> None:  # while `two` waits; a process of its own would have a lock of its own too
        file, until = place.home / "events.txt", time.monotonic() + 30
        while time.monotonic() < until and not (file.exists() and "start two" in file.read_text()):
            time.sleep(0.02)
        run = plan([("trio", "two")], [], folder=place.home / "experiments")
        said = StringIO()
        other = SweepRunner(run, [Slot()], SweepProgress(1, said), [place.launcher])
        other._fill_slots()
        inner.append((other.results, said.getvalue()))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=beside)
    thread.start()
    place.work("two")
    thread.join()
    ((results, said),) = inner
    assert results == {"two": "busy"}
    assert "another `fovlm sweep`" in said


def test_gpus_are_shared_out():
    slots = gpu_slots(["0", "1", "2", "5"], 2)
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0,1", "2,5"]
    assert {slot.env["NUM_GPUS"] for slot in slots} == {"2"}
    for gpus, per_run in ((["0", "1", "2"], 2), (["0", "0"], 1), (["a"], 1)):
        with pytest.raises(UserError, match=r"--gpus|--per-run"):
            gpu_slots(gpus, per_run)


def test_launch_sh_keeps_two_runs_to_their_gpus(place, monkeypatch):
    """The real launch.sh with stand-ins for the launcher and four GPUs: it ends with 0, but nothing was trained."""
    tools = place.home / "bin"
    tools.mkdir()
    for name, text in {"deepspeed": RECORDER, "nvidia-smi": "#!/bin/sh\nseq 0 3\n",
                       "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'}.items():  # fmt: skip
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for key, value in {"PATH": f"{tools}:/usr/bin:/bin", "FOVLM_PYTHON": str(tools / "python"), "SLURM_JOB_ID": "1",
                       "FOVLM_CACHE": str(place.home / "cache")}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    planned = plan(select(["nano-LR1", "nano-A1"]), ["optim.clip=0.5"], seeds=1)
    results = SweepRunner(planned, gpu_slots(["1", "3"], 1), SweepProgress(2, StringIO())).work()
    assert results == {"nano-LR1": "failed", "nano-A1": "failed"}
    logs = [(run.folder / LOG).read_text().splitlines() for run in planned]
    for log, run, gpu in zip(logs, planned, (1, 3), strict=True):
        assert f"arg=localhost:{gpu}" in log
        assert log[0] == "program=deepspeed"
        arguments = [line.removeprefix("arg=") for line in log if line.startswith("arg=")]
        assert arguments[-2:] == [run.name, "optim.clip=0.5"]
    ports = [log[log.index("arg=--master_port") + 1] for log in logs]
    assert ports[0] != ports[1]
