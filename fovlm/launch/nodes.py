"""A run on the nodes of a hostfile: an ssh connection to each, at whose other end `agent` starts the node's ranks.

DeepSpeed's own way, pdsh, kills ranks on SIGTERM before they can save, leaves those of other nodes behind, and waits
without end for a node whose link is down.
"""

import json
import math
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

from fovlm.errors import EXIT_STOPPED, EXIT_USER_ERROR, say
from fovlm.launch.processes import GRACE, on_signals
from fovlm.launch.resources import Resources
from fovlm.paths import ROOT

# No questions; a silent node is given up after two minutes, so that a short outage ends nothing.
SSH = ["ssh", *(f"-o{o}" for o in ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=30"))]
GIVE_UP = 30.0  # seconds for an agent to end its ranks; it may wait GRACE itself
SSH_FAILED = 255  # ssh's own status: no connection, or none any more


class Nodes:
    """The started agents of all nodes; used like `Run`."""

    def __init__(self, command: list[str], env: Mapping[str, str], where: Resources):
        """Start `command`, to which each node adds its number, with `env` on every node of `where`."""
        self.stop_asked = self.killed = False  # by a signal, by a second Ctrl-C
        self.ending = False  # the ranks were asked to end at once
        self.deadline = math.inf  # when what is left of the run is killed, or given up
        self.agents: dict[str, subprocess.Popen[str]] = {}
        early: list[int] = []
        on_signals(lambda number, frame: early.append(number))
        there = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join([sys.executable, '-m', 'fovlm.launch.agent'])}"
        for number, (name, slots) in enumerate(where.hosts.items()):
            job = {"command": command, "node": number, "hosts": dict(where.hosts), "slots": slots, "env": dict(env)}
            self.agents[name] = self._start(name, there, json.dumps(job))
        on_signals(self._pass_on)
        if early:
            self._pass_on(early[0], None)

    def _start(self, name: str, there: str, job: str) -> subprocess.Popen[str]:
        """Start an agent. The output of the first node is ours, a line of another one begins with its name."""
        to = None if not self.agents else subprocess.PIPE
        agent = subprocess.Popen(
            [*SSH, name, there],
            stdin=subprocess.PIPE,
            stdout=to,
            stderr=to and subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal reaches the agents once, from here
            text=True,
            errors="replace",
        )
        _send(agent, job)
        if to:
            threading.Thread(target=_print_lines, args=(name, agent), daemon=True).start()
        return agent

    def wait(self) -> int:
        """Wait until every agent has ended; returns the exit status of the first node that failed."""
        failed: dict[str, int] = {}
        while running := [name for name, agent in self.agents.items() if agent.poll() is None]:
            self._check(failed)
            if time.monotonic() > self.deadline:
                if self.ending:
                    for name in running:
                        say(f"{name} does not answer: its ranks end by themselves after train.hang_minutes")
                        self.agents[name].kill()
                else:
                    self._kill()
            time.sleep(0.2)
        self._check(failed)
        status = next(iter(failed.values()), max(agent.returncode for agent in self.agents.values()))
        return 1 if status == SSH_FAILED else status

    def _check(self, failed: dict[str, int]) -> None:
        """Add the nodes that have failed by themselves to `failed`, and name them."""
        for name, agent in self.agents.items():
            if name in failed or agent.poll() in (None, 0, EXIT_STOPPED):
                continue
            if self.ending and agent.returncode != SSH_FAILED:  # it was asked to
                continue
            failed[name] = agent.returncode
            self.deadline = min(self.deadline, time.monotonic() + GRACE)
            if agent.returncode == SSH_FAILED:
                say(f"{name} is lost: ssh cannot reach it")
            elif agent.returncode != EXIT_USER_ERROR:
                say(f"the ranks on {name} ended with status {agent.returncode}")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop_asked:
            self.killed = True
            self._kill()
            return
        self.stop_asked = True
        say("saving, then stopping" + (" (again: stop at once)" if number == signal.SIGINT else ""))
        self._tell(number)

    def _kill(self) -> None:
        self.ending, self.deadline = True, time.monotonic() + GIVE_UP
        self._tell(signal.SIGKILL)

    def _tell(self, number: int) -> None:
        for agent in self.agents.values():
            _send(agent, str(int(number)))


def _send(agent: subprocess.Popen[str], line: str) -> None:
    if agent.stdin:
        with suppress(OSError):  # it has ended
            agent.stdin.write(line + "\n")
            agent.stdin.flush()


def _print_lines(name: str, agent: subprocess.Popen[str]) -> None:
    for line in agent.stdout or ():
        with suppress(OSError):
            print(f"{name}: {line}", end="", file=sys.stderr, flush=True)
