"""A rank whose launcher dies saves and stops; one whose output closes continues; an exit at once leaks nothing."""

import os
import signal
import subprocess
import sys

import pytest

# Prints lines to both streams; the file named first says how far it came.
PRINTS = """
import sys
from fovlm.train.process import keep_running_without_output
keep_running_without_output()
for n in range(2000):
    print("line", n, flush=n % 2 == 0)
    print("error", n, file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""
# A launcher, or a parent, starts a rank; the rank says how it ended.
RANK = """
import os, signal, sys, time
from fovlm.train.process import stop_without_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))
stop_without_launcher()
print("training", flush=True)
time.sleep(60)
"""
# A queue of a dataloader is closed while its thread has not run yet.
CLOSES_A_QUEUE = """
import multiprocessing, sys
from fovlm.train.process import exit_at_once
queue = multiprocessing.get_context("forkserver").Queue()
queue.put(1)
queue.cancel_join_thread()
queue.close()
sys.setswitchinterval(10)
del queue
exit_at_once(75)
"""
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {RANK!r}]); time.sleep(60)"


def test_an_exit_at_once_leaks_nothing():
    ended = subprocess.run([sys.executable, "-c", CLOSES_A_QUEUE], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout + ended.stderr) == (75, "")


@pytest.mark.parametrize("reads", [0, 1])
def test_a_closed_pipe_ends_nothing(tmp_path, reads):
    done = tmp_path / "done"
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS, str(done)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for stream in (process.stdout, process.stderr):
            for _ in range(reads):
                assert stream.readline()
            stream.close()
        assert process.wait(timeout=60) == 0
    assert done.read_text() == "done"


def test_a_full_disk_behind_the_output_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS, str(tmp_path / "done")], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr.count("\n")) == (0, 2000)


def test_no_output_at_all_ends_nothing(tmp_path):
    done = tmp_path / "done"
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", PRINTS, str(done)]
    assert subprocess.run(closed, timeout=60).returncode == 0
    assert done.read_text() == "done"


@pytest.mark.parametrize("launcher", ["1", ""])
def test_a_rank_that_lost_another_lets_its_launcher_end_it(launcher):
    code = "from fovlm.train.process import wait_to_be_ended as w; print('lost', flush=True); w()"
    env = {**os.environ, "FOVLM_LAUNCHER": launcher}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as rank:
        assert rank.stdout.readline() == b"lost\n"
        if launcher:
            rank.send_signal(signal.SIGTERM)
        assert rank.wait(60) == (-signal.SIGTERM if launcher else 0)


@pytest.mark.parametrize("dies", ["parent", "launch.sh"])
def test_a_rank_stops_when_its_launcher_is_killed(dies):
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "FOVLM_LAUNCHER": str(launcher.pid)},
    ) as parent:  # fmt: skip
        assert parent.stdout.readline() == "training\n"
        os.kill(parent.pid if dies == "parent" else launcher.pid, signal.SIGKILL)  # a zombie until it is waited for
        assert parent.stdout.readline() == "saved\n"
        assert "its launcher is gone" in parent.stderr.readline()
        parent.kill()
    launcher.kill()
    launcher.wait()
