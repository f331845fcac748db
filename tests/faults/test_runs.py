"""Faults of a run in training: deaths, disks, signals, writers, outputs, ranks."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fovlm.checkpoint import store
from fovlm.checkpoint.store import Checkpoints
from helpers import ROOT
from helpers.faults import SAVE, STEPS, Reference, Row
from helpers.training import rows

HOOK = "helpers.disk_faults:"
DIED = -signal.SIGKILL


def one_line(said: str) -> bool:
    return "Traceback" not in said


def until(condition, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_kills_at_random_times(row: Row, whole: Reference):
    """SIGKILL of one rank or both at a random time of a run.
    The others end with a line; the same command resumes to the same losses and weights, to the bit."""
    for i in row.times(0, 30):
        ranks = whole.start(name := f"killed-{i}")
        time.sleep(row.random.uniform(0.1, 1.0) * whole.seconds)
        victim = row.random.choice((0, 1, None))
        ranks.kill(rank=victim)
        statuses = ranks.wait()
        said = ranks.said(0) + ranks.said(1)
        problem = "" if one_line(said) else said[-800:]
        row.check(not (problem := problem or whole.resumes(name)), f"{name}, rank {victim} ({statuses}): {problem}")


def test_kills_at_every_change_of_a_save(row: Row, whole: Reference):
    """SIGKILL at every change of the disk that a save makes, on each of two ranks.
    A whole checkpoint with the weights of its step is left; every fourth is resumed to the end, to the bit."""
    for n, (rank, at) in enumerate(row.each(whole.changes, short=0)):
        name = f"save-{rank}-{at}"
        hook = {"hook": HOOK + "install", "folder": str(whole.run(name)), "step": STEPS, "target": rank, "at": at}
        ranks = whole.start(name, **hook)
        statuses = ranks.wait()
        problem = "" if statuses[rank] == DIED else f"statuses {statuses}"
        problem = problem or ("" if one_line(ranks.said(1 - rank)) else ranks.said(1 - rank)[-800:])
        problem = problem or whole.state(name) or (whole.resumes(name) if row.full and n % 4 == 0 else "")
        row.check(not problem, f"{name}: {problem}")


def test_a_full_disk_at_every_change_of_a_save(row: Row, whole: Reference):
    """A disk that is full, read-only or broken from any change of a save on, on each of two ranks.
    The rank ends with status 2 and one line; a whole checkpoint is left; every fourth is resumed, to the bit."""
    errors = ("ENOSPC", "EROFS", "EIO")
    for n, (rank, at) in enumerate(row.each(whole.changes, short=1)):
        name, error = f"full-{rank}-{at}", errors[at % len(errors)]
        hook = {"hook": HOOK + "install", "folder": str(whole.run(name)), "step": STEPS, "target": rank, "at": at}
        ranks = whole.start(name, **hook, error=error)
        statuses = ranks.wait()
        problem = "" if statuses[rank] == 2 else f"statuses {statuses}: {ranks.said(rank)[-800:]}"
        problem = problem or "".join(s[-800:] for s in (ranks.said(0), ranks.said(1)) if not one_line(s))
        problem = problem or whole.state(name) or (whole.resumes(name) if row.full and n % 4 == 0 else "")
        row.check(not problem, f"{name} {error}: {problem}")


def test_files_that_cannot_grow(row: Row, whole: Reference):
    """Real writes that fail in mid-run (a limit of the size of files), for limits from 0 bytes to a checkpoint's.
    The run ends with status 2 and one line; the same command resumes to the end, to the bit."""
    for i in row.times(0, 8):
        size = (0, 200, 1000, 5000, 20_000, 60_000, 100_000, 200_000)[i]
        ranks = whole.start(name := f"limited-{size}", hook=HOOK + "limit_files", after=SAVE, size=size)
        statuses = ranks.wait()
        problem = "" if 2 in statuses and 0 not in statuses else f"statuses {statuses}: {ranks.said()[-800:]}"
        problem = problem or "".join(s[-800:] for s in (ranks.said(0), ranks.said(1)) if not one_line(s))
        row.check(not (problem := problem or whole.resumes(name)), f"{name}: {problem}")


def test_signals(row: Row, whole: Reference):
    """SIGTERM, SIGHUP or SIGUSR1 at a random step.
    Every rank saves and ends with 75 (or has ended already); the same command resumes to the end, to the bit."""
    for i in row.times(0, 9):
        number = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)[i % 3]
        ranks, seen = whole.start(name := f"signal-{i}"), row.random.randrange(1, STEPS)
        until(lambda name=name, seen=seen: len(rows(whole.home, name)) >= seen)
        ranks.kill(number)
        statuses = ranks.wait()
        problem = "" if statuses in ([75, 75], [0, 0]) else f"statuses {statuses}: {ranks.said()[-800:]}"
        row.check(not (problem := problem or whole.resumes(name)), f"{name}: {problem}")


def test_two_writers(row: Row, whole: Reference):
    """The same command twice at once.
    One trains to the end, to the bit; the other ends with status 2 and names the first."""
    for i in row.times(1, 6):
        pair = [whole.start(name := f"twice-{i}") for _ in range(2)]
        ended = sorted((ranks.wait() for ranks in pair), reverse=True)
        said = pair[0].said() + pair[1].said()
        problem = "" if ended == [[2, 2], [0, 0]] and "trains there already" in said else f"{ended}: {said[-800:]}"
        row.check(not (problem := problem or whole.state(name)), f"{name}: {problem}")


def test_ranks_2_1_2(row: Row, whole: Reference):
    """Two ranks, stopped; one rank, stopped; two ranks to the end.
    Losses are those of the undisturbed run to 5e-6 of them, and no folder of the change of ranks is left."""
    for i in row.times(0, 3):
        name, problem = f"moved-{i}", ""
        for n, world in enumerate((2, 1, 2)):
            ranks = whole.start(name, world=world)
            if n < 2:
                until(lambda name=name, n=n: len(rows(whole.home, name)) >= (1, 4)[n])
                ranks.kill(signal.SIGTERM)
            if (statuses := ranks.wait()) != [75 if n < 2 else 0] * world:
                problem = problem or f"{world} ranks: {statuses}: {ranks.said()[-800:]}"
        losses = [row["loss"] for row in rows(whole.home, name)]
        if losses != pytest.approx(whole.losses, rel=5e-6) or (whole.run(name) / "universal").exists():
            problem = problem or f"losses {losses}"
        row.check(not problem, f"{name}: {problem}")


def test_losses_that_are_not_numbers(row: Row, whole: Reference):
    """Losses of one rank that are NaN, in every pattern over two ranks and some steps.
    The steps are skipped on both ranks, up to two in a row; three in a row end the run with status 2."""
    for rank in row.times(0, 2):
        for steps in ([2], [3], [1, 2], [2, 4, 6], [1, 2, 4, 5], [2, 3, 4]):
            name = f"nan-{rank}-{'-'.join(map(str, steps))}"
            ranks = whole.start(name, hook=HOOK + "spoil", target=rank, steps=steps)
            ends = steps == [2, 3, 4]
            statuses, log = ranks.wait(), (whole.run(name) / "log.txt").read_text()
            held = statuses == [2 * ends] * 2 and log.count(" is skipped: ") == len(steps)
            saved = Checkpoints(whole.run(name)).names()
            row.check(held and (ends or len(saved) == 2), f"{name}: {statuses}, {saved}: {log[-500:]}")


def test_a_closed_output(row: Row, whole: Reference):
    """A reader of the output that goes away after a line (`| head -1`), of stdout or stderr; a full disk behind it.
    The run ends with status 0, and log.txt has every line."""
    for i in row.times(0, 4):
        case = ("stdout", "full", "stderr", "both")[i]
        command = [sys.executable, "-u", "-m", "fovlm.train", *whole.words(name := f"closed-{case}")]
        env = {**os.environ, **whole.env, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        with open("/dev/full", "w") as full:
            out = full if case == "full" else subprocess.PIPE
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=out, text=True)
        if case in ("stdout", "both"):
            process.stdout.readline()
            process.stdout.close()
        if case in ("stderr", "both"):
            process.stderr.close()
        status = process.wait(timeout=300)
        log = (whole.run(name) / "log.txt").read_text()
        row.check(status == 0 and "saved step-00000006" in log, f"{name}: status {status}: {log[-500:]}")


def test_a_launcher_that_is_killed(row: Row, whole: Reference):
    """SIGKILL or SIGHUP of ./launch.sh with two ranks below it.
    The ranks save and end within a minute; the same command resumes to the end, to the bit."""
    for i in row.times(0, 4):
        number, name = (signal.SIGKILL, signal.SIGHUP)[i % 2], f"launched-{i}"
        command = [str(ROOT / "launch.sh"), *whole.words(name, "train.steps=400", "train.save_every=0")]
        env = {**os.environ, **whole.env, "FOVLM_PYTHON": sys.executable, "CPU_RANKS": "2", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            until(lambda name=name: len(rows(whole.home, name)) >= 2)
            below = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            left = psutil.wait_procs(below, timeout=60)[1]
            saved = Checkpoints(whole.run(name)).names()
            found = Checkpoints(whole.run(name)).first_whole(verify=store.verify)
            row.check(not left and len(saved) == 1 and found is not None, f"{name}: {left} left, {saved}")
