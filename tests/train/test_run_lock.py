"""One writer for a run folder, on one host and over a network disk; locks that were left behind stop nobody."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from fovlm import distributed
from fovlm.errors import UserError
from fovlm.train import run_lock
from fovlm.train.run_lock import RunLock, check_shared

HOLD = """
import sys, time
from pathlib import Path
from fovlm.train import run_lock
run_lock.BEAT = 0.05
lock = run_lock.RunLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    for name, seconds in (("BEAT", 0.05), ("SILENT", 0.4), ("LINGER", 0.5)):
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_by_the_name_of_the_first(holder, tmp_path):
    with pytest.raises(UserError, match=f"process {holder.pid} on {socket.gethostname()} trains there already.*name="):
        RunLock(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()
    assert (tmp_path / "run.lock").read_text() == ""
    RunLock(tmp_path).release()


def test_without_locks_of_the_system_the_file_decides(holder, tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="trains there already"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()
    (tmp_path / "run.lock").write_text(f"{socket.gethostname()}:{os.getpid()} 1\n")  # a number that was used before
    RunLock(tmp_path).release()


def test_the_lock_of_another_host_holds_while_it_gives_signs_of_life(tmp_path):
    file, ended = tmp_path / "run.lock", threading.Event()

    def beat() -> None:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT)
        for n in range(1000):
            os.pwrite(handle, f"elsewhere:7 {n}\n".encode(), 0)  # the file is never empty
            if ended.wait(0.03):
                return

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        time.sleep(0.1)
        with pytest.raises(UserError, match=r"process 7 on elsewhere trains there already.*remove run.lock"):
            RunLock(tmp_path)
    finally:
        ended.set()
        beating.join()
    RunLock(tmp_path).release()


def test_a_process_whose_folder_was_taken_ends_without_a_save(holder, tmp_path):
    while holder.poll() is None:
        (tmp_path / "run.lock").write_text("elsewhere:7 1\n")
        time.sleep(0.02)
    assert holder.returncode == 1
    assert (tmp_path / "run.lock").read_text() == "elsewhere:7 1\n"


@pytest.mark.parametrize("text", ["", "\x00\xff", "no process", f"{socket.gethostname()}:{10**30} 1", "a:b:c d"])
def test_a_damaged_lock_stops_nobody(tmp_path, text):
    (tmp_path / "run.lock").write_bytes(text.encode("latin-1"))
    lock = RunLock(tmp_path)
    assert (tmp_path / "run.lock").read_text().startswith(f"{socket.gethostname()}:{os.getpid()} ")
    lock.release()


def test_a_run_folder_that_another_host_does_not_see_is_refused(tmp_path, monkeypatch):
    of_two = {tuple: [(True, "a"), (False, "b")], str: ["", ""]}  # what the ranks say
    monkeypatch.setattr(distributed, "gather", lambda value: of_two[type(value)])
    with pytest.raises(UserError, match=f"^b: {tmp_path} is not that of the first node"):
        check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
