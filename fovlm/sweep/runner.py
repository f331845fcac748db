"""Does many runs: one after another, or side by side on the GPUs (or cores) that were given.

    plan (many_plan.py) -> launch.sh NAME ... for each, in a slot that is free -> runs.csv (many_table.py)

Every run is a `launch.sh` of its own, so whatever happens to one leaves the others alone. What is finished is left
alone, what was interrupted goes on, a failure is told and the rest still done. A signal reaches every run, which saves;
what is over when all have ended is told, and the same command goes on from there.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fovlm.checkpoint.run_folder import read_summary
from fovlm.errors import EXIT_STOPPED, UserError
from fovlm.paths import ROOT, run_root
from fovlm.sweep import table
from fovlm.sweep.progress import SweepProgress, span
from fovlm.sweep.select import PlannedRun, run_status

LAUNCH = ROOT / "launch.sh"
LOG = "launch.log"  # in the run folder: all that launch.sh and the run printed
TAIL = 15  # lines of it that are shown when a run failed
EVERY = 0.2  # seconds between two looks
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time: what it says, and the environment that keeps a run inside it."""

    said: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # variables that a run in here must not see


def gpu_slots(gpus: list[str], per_run: int) -> list[Slot]:
    """A slot for every `per_run` of the GPUs. Raises UserError when they cannot be shared out so.

    Inside a SLURM allocation such runs start without srun, which would not keep them to their GPUs.
    """
    if len(set(gpus)) != len(gpus) or not all(gpu.isdigit() for gpu in gpus):
        raise UserError(f"--gpus {','.join(gpus)}: numbers of GPUs, each once, like 0,1,2,3")
    if len(gpus) % per_run:
        raise UserError(f"--per-run {per_run}: {len(gpus)} GPUs cannot be shared out so")
    parts = [gpus[n : n + per_run] for n in range(0, len(gpus), per_run)]
    cores = max(1, (os.cpu_count() or 1) // len(gpus))
    return [
        Slot(
            f" on GPU {','.join(part)}",
            {"CUDA_VISIBLE_DEVICES": ",".join(part), "NUM_GPUS": str(per_run), **_threads(cores)},
            ("SLURM_JOB_ID", "HOSTFILE"),
        )
        for part in parts
    ]


def cpu_slots(jobs: int, ranks: int) -> list[Slot]:
    """`jobs` slots on the CPU, of `ranks` processes each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {"NUM_GPUS": "0", "CPU_RANKS": str(ranks), **_threads(max(1, cores // (jobs * ranks)))}
    return [Slot("", env, ("SLURM_JOB_ID", "HOSTFILE"))] * jobs


def _threads(number: int) -> dict[str, str]:
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(number)}


@dataclass
class Child:
    """A run that goes on."""

    run: PlannedRun
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    port: int
    began: float


class SweepRunner:
    """Does the runs in their order, each in the first free slot, after those it starts from (`model.init_from`)."""

    def __init__(self, planned: list[PlannedRun], slots: list[Slot], watch: SweepProgress, launch: Path = LAUNCH):
        self.waiting, self.slots, self.watch, self.launch = list(planned), slots, watch, launch
        self.children: list[Child] = []
        self.results: dict[str, str] = {}  # name -> finished, stopped, failed, changed, blocked or busy
        self.stopping = False

    def work(self, again: bool = False) -> dict[str, str]:
        """Do them all, and return how each ended; those that a signal kept from starting are missing.

        `again`: what was made under other settings is moved out of the way, to `old/` beside it, and started anew.
        """
        before = {number: signal.signal(number, self._asked_to_stop) for number in STOP}
        try:
            self._judge(again)
            while self.children or (self.waiting and not self.stopping):
                self._fill_slots()
                time.sleep(EVERY)
                for child in [c for c in self.children if c.process.poll() is not None]:
                    self._ended(child)
                self.watch.look([c.run for c in self.children])
        finally:
            for child in self.children:  # only after an error of our own
                os.killpg(child.process.pid, signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.results

    def _judge(self, again: bool) -> None:
        """Take out what is finished or would mix with other settings. Raises UserError for a damaged runs.csv."""
        table.read(run_root())  # while nothing runs that it would end
        rows = {}
        for run in list(self.waiting):
            how = run_status(run)
            if how == "changed" and again:
                _move_away(run.folder)
            elif how == "changed":
                self._leave(run, "changed", f"{run.folder} was made under other settings: not touched; --again starts "
                            "it anew (the old folder is kept)")  # fmt: skip
            elif how == "finished":
                rows[run.name] = table.row_of(run, "finished")
                self._leave(run, "finished", "finished already")
        if rows:
            table.write(run_root(), rows)

    def _leave(self, run: PlannedRun, result: str, said: str) -> None:
        self.waiting.remove(run)
        self.results[run.name] = result
        self.watch.ends(run, said)

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

    def _start(self, run: PlannedRun, slot: int) -> bool:
        run.folder.mkdir(parents=True, exist_ok=True)
        log = (run.folder / LOG).open("ab")
        try:
            # The lock goes with the open file to launch.sh and all below it, and ends with the last of them.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            self._leave(run, "busy", "another `fovlm run` is at it already")
            return False
        goes_on = run_status(run) == "begun"
        place, port = self.slots[slot], _free_port({c.port for c in self.children})
        env = {key: value for key, value in os.environ.items() if key not in place.without} | dict(place.env)
        env |= {"MASTER_PORT": str(port), "FOVLM_PYTHON": os.environ.get("FOVLM_PYTHON", sys.executable)}
        process = subprocess.Popen(
            [str(self.launch), *run.words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C comes here alone, and is passed on
        )
        self.waiting.remove(run)
        self.children.append(Child(run, slot, process, log, port, time.time()))
        self.watch.starts(run, place.said, goes_on)
        known = {"ended": ""} if goes_on and table.read(run_root()).get(run.name, {}).get("started") else {
            "started": _clock(), "ended": ""}  # fmt: skip
        table.write(run_root(), {run.name: table.row_of(run, "running", **known)})
        return True

    def _ended(self, child: Child) -> None:
        self.children.remove(child)
        child.log.close()
        run, status, took = child.run, child.process.returncode, span(time.time() - child.began)
        told = read_summary(run.folder).get("status")
        if status == 0 and told == "finished":
            result = "finished"
            losses = read_summary(run.folder).get("final", {})
            said = f"finished in {took}" + (f", val {losses['val_loss']:.4f}" if "val_loss" in losses else "")
        elif status == EXIT_STOPPED or self.stopping:
            result, said = "stopped", f"stopped after {took}; the same command goes on from its last checkpoint"
        else:
            result, said = "failed", f"FAILED after {took} (status {status}); the end of {run.folder / LOG}:"
        self.results[run.name] = result
        table.write(run_root(), {run.name: table.row_of(run, result, ended=_clock())})
        self.watch.ends(run, said)
        if result == "failed":
            for line in _tail(run.folder / LOG):
                self.watch.say(f"    {line}")

    def _asked_to_stop(self, number: int, frame: object) -> None:
        """Pass it on: launch.sh makes the ranks save; a second Ctrl-C makes it kill them."""
        if not self.stopping:
            self.watch.say("saving, then stopping" + (" (again: stop at once)" if number == signal.SIGINT else ""))
        self.stopping = True
        for child in self.children:
            if child.process.poll() is None:
                os.killpg(child.process.pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def exit_status(results: Mapping[str, str], planned: list[PlannedRun], say: Callable[[str], None]) -> int:
    """Tell how it went in all; 0 when all are finished, 75 when a signal stopped it, else 1."""
    by_result: dict[str, list[str]] = {}
    for run in planned:
        by_result.setdefault(results.get(run.name, "not started"), []).append(run.name)
    finished = by_result.pop("finished", [])
    say(f"{len(finished)} of {len(planned)} finished; the table: {run_root() / table.FILE}")
    for result, names in by_result.items():
        say(f"{result}: {' '.join(names)}")
    if len(finished) == len(planned):
        return 0
    return 1 if {"failed", "changed", "blocked", "busy"} & by_result.keys() else EXIT_STOPPED


def _move_away(folder: Path) -> None:
    target = folder.parent / "old" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)


def _free_port(taken: set[int]) -> int:
    while True:
        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        if port not in taken:
            return port


def _clock() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _tail(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
