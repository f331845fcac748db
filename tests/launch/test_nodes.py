"""launch.sh with a hostfile, and a stand-in for ssh that stays on this machine; tests/cluster has the real one."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fovlm.launch.nodes import Nodes
from helpers import ROOT
from helpers.launch import TREE

# ssh NODE COMMAND, on this machine; the node LOST cannot be reached.
SSH = """#!/bin/sh
while case $1 in -*) ;; *) false ;; esac; do shift; done
[ "$1" != "${LOST:-}" ] || { sleep 3; exit 255; }
shift
exec sh -c "$*"
"""


@pytest.fixture
def two_nodes(place):
    place.program("ssh", SSH)
    (place.folder / "hosts").write_text("# two nodes\none slots=2\n\ntwo slots=2  # the other\n")
    place.env["HOSTFILE"] = str(place.folder / "hosts")
    return place


def test_a_hostfile_starts_a_launcher_on_every_node_over_ssh(two_nodes):
    done = two_nodes.launch("hunt", FOVLM_DATA="/shards", MASTER_PORT="1234", NUM_GPUS="0")
    first, second = done.stdout.splitlines(), done.stderr.splitlines()
    assert done.returncode == 0
    assert "arg=--node_rank=0" in first
    assert {"two: program=deepspeed", "two: arg=--no_ssh", "two: arg=--node_rank=1", "two: arg=hunt"} <= set(second)
    assert "\n".join(["arg=--master_port", "arg=1234", "arg=--master_addr", "arg=one"]) in done.stdout
    assert {"FOVLM_DATA=/shards", "DS_ACCELERATOR=cpu"} <= set(first)
    assert {"two: FOVLM_DATA=/shards", "two: DS_ACCELERATOR=cpu"} <= set(second)


def test_every_node_has_the_hosts_of_the_hostfile(two_nodes):
    two_nodes.program("deepspeed", '#!/bin/sh\nfor a; do case $a in --hostfile=*) cat "${a#*=}" ;; esac; done\n')
    relative = {**two_nodes.env, "HOSTFILE": "hosts", "NUM_GPUS": "4"}  # to where the command was typed
    command = [str(ROOT / "launch.sh"), "hunt"]
    done = subprocess.run(command, env=relative, cwd=two_nodes.folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "one slots=4\ntwo slots=4\n")


@pytest.mark.parametrize("line", ["one slots=2", "three", "three slots=0"])
def test_mistakes_in_a_hostfile_are_one_line(two_nodes, line):
    with (two_nodes.folder / "hosts").open("a") as hosts:
        hosts.write(line + "\n")
    done = two_nodes.launch("hunt")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "line 5: must be" in done.stderr


def test_with_a_hostfile_the_launchers_options_choose_no_nodes(two_nodes):
    done = two_nodes.launch("hunt", "--", "--include", "one:0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the hostfile says where to run" in done.stderr


def test_a_lost_node_is_named_and_ends_the_run_on_the_others(two_nodes):
    two_nodes.program("deepspeed", TREE.format(python=sys.executable))
    done = two_nodes.launch("hunt", LOST="two")
    assert (done.returncode, done.stdout) == (1, "training\n")
    assert "fovlm: two is lost: ssh cannot reach it" in done.stderr.splitlines()
    assert "hunt failed (status 1), see above; from the last good checkpoint, to resume:" in done.stderr


def test_a_node_that_ssh_gives_up_while_the_run_is_ended_is_named(capsys):
    nodes = object.__new__(Nodes)
    nodes.ending, nodes.deadline, failed = True, 0.0, {}
    nodes.agents = {name: SimpleNamespace(poll=lambda s=s: s, returncode=s) for name, s in (("one", 1), ("two", 255))}
    nodes._check(failed)
    assert failed == {"two": 255}  # the other was asked to end
    assert capsys.readouterr().err == "fovlm: two is lost: ssh cannot reach it\n"


def test_a_signal_reaches_the_ranks_of_every_node(two_nodes):
    two_nodes.program("deepspeed", TREE.format(python=sys.executable))
    command, pipe = [str(ROOT / "launch.sh"), "hunt"], subprocess.PIPE
    with subprocess.Popen(command, env=two_nodes.env, stdout=pipe, stderr=pipe, text=True) as run:
        assert (run.stdout.readline(), run.stderr.readline()) == ("training\n", "two: training\n")
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (75, "saved\n")
    assert "two: saved" in err.splitlines()
    assert "hunt saved and stopped" in err
