"""Two nodes on this machine (scripts/cluster.sh), and runs on them."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fovlm.checkpoint.run_folder import read_metrics
from helpers import ROOT

SCRIPT = ROOT / "scripts" / "cluster.sh"
PROGRAMS = ("ip", "nsenter", "sshd", "munged", "slurmctld", "slurmd")
# A small model, few packs a step, and nothing but steps and saves.
SMALL = ("quickstart", "train.log_every=1", "train.eval_every=0", "train.best=train_loss", "train.packs_per_step=4")


def wait_for(what: str, condition, seconds: float = 600) -> None:
    """Wait until `condition()`; fails with `what` after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.3)


@dataclass
class Cluster:
    """Two nodes, `node-a` and `node-b`; everything of theirs is below `folder`."""

    folder: Path

    def command(self, node: str, *command: str, **env: str) -> list[str]:
        """The command line that runs `command` on a node, in a plain environment."""
        plain = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.folder / node / "home"),
            "FOVLM_PYTHON": sys.executable,
            "FOVLM_DATA": str(self.folder / "data"),
            "FOVLM_RUNS": str(self.folder / "runs"),
            "FOVLM_CACHE": str(self.folder / "cache"),
            "NUM_GPUS": "0",
            "OMP_NUM_THREADS": "1",
        }
        pairs = [f"{key}={value}" for key, value in {**plain, **env}.items()]
        return ["env", "-i", *pairs, str(SCRIPT), "on", str(self.folder), node, *command]

    def on(self, node: str, *command: str, **env: str) -> str:
        """The output of a command on a node."""
        done = subprocess.run(self.command(node, *command, **env), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def processes(self, node: str) -> list[str]:
        """The command lines of a node that have to do with training."""
        lines = self.on(node, "ps", "-eo", "args=").splitlines()
        return [line for line in lines if "fovlm" in line and "python" in line]

    def hosts(self, *nodes: str) -> str:
        """A hostfile of two ranks on each of the nodes."""
        file = self.folder / f"hosts-{len(nodes)}"
        file.write_text("".join(f"{node} slots=2\n" for node in nodes))
        return str(file)

    def launch(self, log: str, *words: str, **env: str) -> subprocess.Popen[bytes]:
        """launch.sh on node-a; its output is in the file `log`."""
        with (self.folder / log).open("wb") as out:
            command = self.command("node-a", str(ROOT / "launch.sh"), *words, **env)
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def text(self, log: str) -> str:
        """What is in a log so far."""
        file = self.folder / log
        return file.read_text(errors="replace") if file.exists() else ""

    def losses(self, name: str) -> list[float]:
        """The loss of every step of a run."""
        return [row["loss"] for row in read_metrics(self.folder / "runs" / name) if "loss" in row]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if os.geteuid():
        pytest.skip("must be root to make network namespaces")
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]).returncode:
        pytest.skip("no namespaces here")
    if not all(shutil.which(name) for name in PROGRAMS) and (
        not shutil.which("apt-get") or subprocess.run([str(SCRIPT), "install"]).returncode
    ):
        pytest.skip("cannot install openssh-server, slurm-wlm and munge with apt-get")
    folder = tmp_path_factory.mktemp("cluster") / "nodes"
    up = subprocess.Popen([str(SCRIPT), "up", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert up.stdout.readline() == "ready\n"
        pids = [int((folder / node / "pid").read_text()) for node in ("node-a", "node-b")]
        yield Cluster(folder)
    finally:
        up.stdin.close()
        up.wait(30)
    wait_for("both nodes are gone", lambda: not any(psutil.pid_exists(pid) for pid in pids), 30)
