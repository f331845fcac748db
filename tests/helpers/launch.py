"""Start the ranks of a script or module on this machine, as a launcher would: `env://` over gloo."""

import os
import socket
import subprocess
import sys

from helpers import ROOT

# A stand-in for a launcher, which says how it was called.
RECORDER = """#!/bin/sh
echo "program=$(basename "$0")"
for a in "$@"; do echo "arg=$a"; done
env | grep -E '^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_|DS_|OMP_NUM|TRITON_CACHE|TORCH_EXT|HF_HOME|CUDA_VIS|FOVLM_LAUNCHER)'
exit ${STATUS:-0}
"""


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
