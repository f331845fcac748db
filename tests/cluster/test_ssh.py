"""Two nodes over ssh: the losses of one node, a link that goes down, a node that dies, a stop, and resuming."""

import os
import re
import signal
import time

import pytest

from cluster.conftest import SMALL, wait_for

pytestmark = pytest.mark.cluster


def test_two_nodes_train_like_one(cluster):
    words = ("quickstart", "train.steps=20", "train.log_every=1")
    both = cluster.launch("both.log", *words, "name=both", HOSTFILE=cluster.hosts("node-a", "node-b"))
    assert both.wait(1200) == 0, cluster.text("both.log")
    alone = cluster.launch("alone.log", *words, "name=alone", CPU_RANKS="4")
    assert alone.wait(1200) == 0, cluster.text("alone.log")
    assert len(cluster.losses("both")) == 20
    assert cluster.losses("both") == pytest.approx(cluster.losses("alone"), rel=1e-4)


def test_a_run_folder_that_is_not_shared_is_refused(cluster):
    own = cluster.folder / "own"
    own.mkdir()
    cluster.on("node-b", "mount", "-t", "tmpfs", "tmpfs", str(own))
    both = cluster.hosts("node-a", "node-b")
    run = cluster.launch("own.log", *SMALL, "train.steps=2", HOSTFILE=both, FOVLM_RUNS=str(own))
    assert run.wait(600) == 2
    said = f"fovlm: node-b: {own / 'quickstart'} is not that of the first node: all must share FOVLM_RUNS"
    assert said in cluster.text("own.log").splitlines()


def test_a_lost_node_ends_the_run_with_its_name_and_the_same_command_resumes(cluster):
    words = (*SMALL, "train.steps=4000", "train.save_every=2", "train.hang_minutes=1", "name=lost")
    both = {"HOSTFILE": cluster.hosts("node-a", "node-b")}

    resumed = r"resuming from .*\n(.*\n)*.*loss"
    run = cluster.launch("link.log", *words, **both)
    wait_for("a checkpoint", lambda: "saved step-" in cluster.text("link.log"))
    cluster.on("node-b", "ip", "link", "set", "eth0", "down")
    began = time.monotonic()
    assert run.wait(600) == 1
    assert time.monotonic() - began < 60 + 60, "train.hang_minutes, and the time to end"
    # Which of the two depends on whether ssh gives the connection up before the launcher does.
    assert re.search("fovlm: node-b (does not answer|is lost)", cluster.text("link.log"))
    wait_for("the ranks of node-b end by themselves", lambda: not cluster.processes("node-b"), 60)
    cluster.on("node-b", "ip", "link", "set", "eth0", "up")

    run = cluster.launch("dies.log", *words, **both)
    wait_for("a step after resuming", lambda: re.search(resumed, cluster.text("dies.log")))
    os.kill(int((cluster.folder / "node-b" / "pid").read_text()), signal.SIGKILL)
    began = time.monotonic()
    assert run.wait(600) == 1
    assert time.monotonic() - began < 120
    assert "fovlm: node-b is lost: ssh cannot reach it" in cluster.text("dies.log")
    assert not cluster.processes("node-a"), "nobody is left behind"

    run = cluster.launch("unreachable.log", *words, **both)
    assert run.wait(600) == 1
    assert "fovlm: node-b is lost: ssh cannot reach it" in cluster.text("unreachable.log")

    run = cluster.launch("remaining.log", *words, HOSTFILE=cluster.hosts("node-a"))
    wait_for("a step on one node", lambda: re.search(resumed, cluster.text("remaining.log")))
    (launcher,) = cluster.on("node-a", "pgrep", "-f", "fovlm.launch quickstart").split()
    cluster.on("node-a", "kill", "-TERM", launcher)
    assert run.wait(600) == 75
    assert "fovlm: quickstart saved and stopped" in cluster.text("remaining.log")
    assert not cluster.processes("node-a")
