"""Fresh processes, ranks started as by a launcher (`env://` over gloo), and stand-ins for launchers."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import ROOT

# A stand-in for a launcher, which says how it was called.
RECORDER = """#!/bin/sh
echo "program=$(basename "$0")"
for a in "$@"; do echo "arg=$a"; done
env | grep -E '^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_|DS_|OMP_|TRITON_CACHE|TORCH_EXT|HF_HOME|CUDA_VIS|FOVLM_[DL]A)'
exit ${STATUS:-0}
"""


# A launcher with one rank below it, like deepspeed's: launcher -> node launcher -> rank. The rank saves on SIGTERM.
TREE = """#!{python}
import os, signal, subprocess, sys
level = int(os.environ.get("LEVEL", "0"))
if level < 2:
    child = subprocess.Popen([sys.executable, __file__], env={{**os.environ, "LEVEL": str(level + 1)}})
    if os.environ.get("LEAVE") and level == 0:
        os._exit(0)
    sys.exit(child.wait())
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, (lambda *_: (print("saved", flush=True), os._exit(75)))
                  if "EARLY" not in os.environ else signal.SIG_DFL)
print("training", flush=True)
while True:
    signal.pause()
"""


def fresh_python(code: str, *arguments: str, **options: Any) -> str:
    """What `code` prints in a process of its own; fails when that does.

    Without collections of garbage and the end of the interpreter, half of the time of a process that imports torch and
    transformers.
    """
    code = f"import gc; gc.disable()\n{code}\nimport os, sys; sys.stdout.flush(); os._exit(0)"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, **({"cwd": ROOT} | options))
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_ranks(world: int, command: list[str], env: dict[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """One process for each rank of `python COMMAND ...`; their output is to be read from `stdout`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ordinary = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"},
        **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**ordinary, **(env or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def run_ranks(world: int, command: list[str], env: dict[str, str] | None = None, status: int = 0) -> str:
    """Run to the end and return rank 0's output; fails when a rank ends with another status."""
    processes = start_ranks(world, command, env)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, f"status {process.returncode}\n{output}"
    return outputs[0]


class Place:
    """A PATH with stand-ins, and an environment as it is on a fresh machine."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.program("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for name in ("deepspeed", "srun"):
            self.program(name, RECORDER)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "FOVLM_PYTHON": str(self.bin / "python"),
            "FOVLM_CACHE": str(folder / "cache"),
            "FOVLM_RUNS": str(folder / "runs"),  # a checkout may have runs of its own
        }

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpus(self, count: int) -> None:
        self.program("nvidia-smi", f"#!/bin/sh\nseq 0 {count - 1}\n")

    def launch(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "launch.sh"), *arguments]
        return subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=120)

    def recorded(self, *arguments: str, **env: str) -> tuple[str, list[str], dict[str, str]]:
        """(program, arguments, environment) that launch.sh ended up with."""
        done = self.launch(*arguments, **env)
        assert done.returncode == 0, done.stderr
        pairs = [line.split("=", 1) for line in done.stdout.splitlines()]
        args = [value for key, value in pairs if key == "arg"]
        environment = {key: value for key, value in pairs if key not in ("arg", "program")}
        return next(value for key, value in pairs if key == "program"), args, environment
