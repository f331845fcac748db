"""`python -m fovlm.launch.agent`, at the other end of an ssh connection: the ranks of one node of a hostfile.

The first line of standard input says what to start, in JSON, so that no secret is on a command line. Each further line
is a signal for the ranks. When it ends the connection is gone: the ranks save and stop if they can.
"""

import json
import os
import signal
import sys
import tempfile
import threading

from fovlm.launch.processes import Run
from fovlm.launch.resources import cpu_cores


def main() -> int:
    """Start what standard input says; returns its exit status."""
    job = json.loads(sys.stdin.readline())
    env = {**os.environ, **job["env"]}
    env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // job["slots"])))
    with tempfile.NamedTemporaryFile("w", prefix="fovlm-hosts-") as hosts:
        hosts.write("".join(f"{name} slots={slots}\n" for name, slots in job["hosts"].items()))
        hosts.flush()
        program, *rest = job["command"]
        node = ["--no_ssh", f"--node_rank={job['node']}", f"--hostfile={hosts.name}"]
        run = Run([program, *node, *rest], env, announce=False)
        threading.Thread(target=obey, args=(run,), daemon=True).start()
        return run.wait()


def obey(run: Run) -> None:
    """Pass the signals of standard input on to the ranks, and SIGHUP when it ends."""
    for line in sys.stdin:
        if int(line) == signal.SIGKILL:
            run.kill()
        else:
            os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGHUP)


if __name__ == "__main__":
    status = main()
    os._exit(status)  # a thread that waits for standard input makes an ordinary exit fail
