"""Runs many experiments, one after another or side by side on the given GPUs or cores.

    plan (select.py) -> a launcher (launch.sh NAME ...) for each, in a free slot -> runs.csv (table.py)

Every run is a launcher of its own, so a failure leaves the others alone. Finished runs are skipped, interrupted runs
resume, a failed run prints the tail of its log, and the sweep continues. A signal is passed on to every run, which
saves; the same command resumes.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from fovlm.checkpoint.run_folder import read_summary
from fovlm.errors import EXIT_STOPPED, UserError
from fovlm.launch.main import COMMAND
from fovlm.launch.processes import SIGNALS
from fovlm.launch.resources import cpu_cores, free_port
from fovlm.paths import run_root
from fovlm.sweep import table
from fovlm.sweep.progress import SweepProgress, duration
from fovlm.sweep.select import PlannedRun, run_status

LOG = "launch.log"  # in the run folder: the output of the launcher and of the run
TAIL = 15  # lines of it that are printed when a run failed
EVERY = 0.2  # seconds between two checks of the runs
NOT_INHERITED = ("SLURM_JOB_ID", "HOSTFILE")  # with them a run would spread beyond its slot


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time: its description, and the environment that keeps a run inside it."""

    where: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # variables that are removed


def gpu_slots(gpus: list[str], per_run: int) -> list[Slot]:
    """A slot for every `per_run` of the GPUs. Raises UserError when they cannot be divided so."""
    if len(set(gpus)) != len(gpus) or not all(gpu.isdigit() for gpu in gpus):
        raise UserError(f"--gpus {','.join(gpus)}: must be numbers of GPUs, each once, like 0,1,2,3")
    if len(gpus) % per_run:
        raise UserError(f"--per-run {per_run}: does not divide {len(gpus)} GPUs")
    parts = [",".join(gpus[n : n + per_run]) for n in range(0, len(gpus), per_run)]
    env = {"NUM_GPUS": str(per_run)} | _threads((os.cpu_count() or 1) // len(gpus))
    return [Slot(f" on GPU {part}", env | {"CUDA_VISIBLE_DEVICES": part}, NOT_INHERITED) for part in parts]


def cpu_slots(jobs: int, ranks: int) -> list[Slot]:
    """`jobs` slots on the CPU, of `ranks` processes each."""
    env = {"NUM_GPUS": "0", "CPU_RANKS": str(ranks)} | _threads(cpu_cores() // (jobs * ranks))
    return [Slot("", env, NOT_INHERITED)] * jobs


def _threads(number: int) -> dict[str, str]:
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, number))}


@dataclass
class Child:
    """A run in progress."""

    run: PlannedRun
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    port: int
    began: float


class SweepRunner:
    """Starts the runs in their order, each in the first free slot, after the run it starts from (`model.init_from`)."""

    def __init__(
        self, planned: list[PlannedRun], slots: list[Slot], progress: SweepProgress, launch: Sequence[str] = COMMAND
    ):
        self.waiting, self.slots, self.progress, self.launch = list(planned), slots, progress, launch
        self.children: list[Child] = []
        self.results: dict[str, str] = {}  # name -> finished, stopped, failed, stale, blocked or busy
        self.stopping = False

    def work(self, again: bool = False) -> dict[str, str]:
        """Run them all; returns the result of each. Runs that a signal kept from starting are missing.

        `again` moves stale run folders to `old/` beside them and starts those runs from scratch.
        """
        before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            self._skip(again)
            while self.children or (self.waiting and not self.stopping):
                self._fill_slots()
                time.sleep(EVERY)
                for child in [c for c in self.children if c.process.poll() is not None]:
                    self._end(child)
                self.progress.update([c.run for c in self.children])
        finally:
            for child in self.children:  # only after an error of our own
                os.killpg(child.process.pid, signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.results

    def _skip(self, again: bool) -> None:
        """Take out the runs that are finished or stale. Raises UserError for a damaged runs.csv."""
        table.read(run_root())  # now, while no run would be lost
        rows = {}
        for run in list(self.waiting):
            status = run_status(run)
            if status == "stale" and again:
                _move_away(run.folder)
            elif status == "stale":
                self._leave(run, "stale", f"{run.folder} was made under other settings and is left alone; --again "
                            "moves it away and starts from scratch")  # fmt: skip
            elif status == "finished":
                rows[run.name] = table.row_of(run, "finished")
                self._leave(run, "finished", "finished already")
        if rows:
            table.write(run_root(), rows)

    def _leave(self, run: PlannedRun, result: str, text: str) -> None:
        self.waiting.remove(run)
        self.results[run.name] = result
        self.progress.end(run, text)

    def _fill_slots(self) -> None:
        for slot in range(len(self.slots)):
            if self.stopping or slot in [c.slot for c in self.children]:
                continue
            for run in list(self.waiting):
                needs = run.experiment.model.init_from
                if needs in [c.run.name for c in self.children] or needs in [r.name for r in self.waiting]:
                    continue  # comes after it
                if self.results.get(needs or "", "finished") != "finished":
                    self._leave(run, "blocked", f"not started: it starts from {needs}, which is not finished")
                    continue
                if self._start(run, slot):
                    break

    def _start(self, run: PlannedRun, number: int) -> bool:
        run.folder.mkdir(parents=True, exist_ok=True)
        log = (run.folder / LOG).open("ab")
        try:
            # The launcher and its processes inherit the lock with the open file; it ends with the last of them.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            self._leave(run, "busy", "another `fovlm sweep` is training it")
            return False
        resumes = run_status(run) == "resumable"
        slot, port = self.slots[number], free_port({c.port for c in self.children})
        env = {key: value for key, value in os.environ.items() if key not in slot.without} | dict(slot.env)
        env |= {"MASTER_PORT": str(port), "FOVLM_PYTHON": os.environ.get("FOVLM_PYTHON", sys.executable)}
        process = subprocess.Popen(
            [*self.launch, *run.words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C comes here alone, and is passed on
        )
        self.waiting.remove(run)
        self.children.append(Child(run, number, process, log, port, time.time()))
        self.progress.start(run, slot.where, resumes)
        times = {"started": _clock(), "ended": ""}
        if resumes and table.read(run_root()).get(run.name, {}).get("started"):
            del times["started"]
        table.write(run_root(), {run.name: table.row_of(run, "running", **times)})
        return True

    def _end(self, child: Child) -> None:
        self.children.remove(child)
        child.log.close()
        run, status, took = child.run, child.process.returncode, duration(time.time() - child.began)
        summary = read_summary(run.folder)
        if status == 0 and summary.get("status") == "finished":
            loss = summary.get("final", {}).get("val_loss")
            result, text = "finished", f"finished in {took}" + ("" if loss is None else f", val {loss:.4f}")
        elif status == EXIT_STOPPED or self.stopping:
            result, text = "stopped", f"stopped after {took}; the same command resumes from its last checkpoint"
        else:
            result, text = "failed", f"FAILED after {took} (status {status}); the end of {run.folder / LOG}:"
        self.results[run.name] = result
        table.write(run_root(), {run.name: table.row_of(run, result, ended=_clock())})
        self.progress.end(run, text)
        if result == "failed":
            for line in (run.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]:
                self.progress.say(f"    {line}")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on: the launcher makes the ranks save, and kills them at a second Ctrl-C."""
        if not self.stopping:
            self.progress.say("saving, then stopping" + (" (again: stop at once)" if number == signal.SIGINT else ""))
        self.stopping = True
        for child in self.children:
            if child.process.poll() is None:
                os.killpg(child.process.pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def exit_status(results: Mapping[str, str], planned: list[PlannedRun], say: Callable[[str], None]) -> int:
    """Say how the sweep ended; 0 when all runs are finished, 75 when a signal stopped it, else 1."""
    by_result: dict[str, list[str]] = {}
    for run in planned:
        by_result.setdefault(results.get(run.name, "not started"), []).append(run.name)
    finished = by_result.pop("finished", [])
    say(f"{len(finished)} of {len(planned)} finished; the table: {run_root() / table.FILE}")
    for result, names in by_result.items():
        say(f"{result}: {' '.join(names)}")
    if not by_result:
        return 0
    return 1 if {"failed", "stale", "blocked", "busy"} & by_result.keys() else EXIT_STOPPED


def _move_away(folder: Path) -> None:
    target = folder.parent / "old" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)


def _clock() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
