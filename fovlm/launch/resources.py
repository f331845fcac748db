"""Where a run can start: the GPUs of this machine, a hostfile, a SLURM allocation."""

import os
import re
import socket
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fovlm.errors import UserError

CPU_RANKS = 2  # processes where there is no GPU


@dataclass(frozen=True)
class Resources:
    """Where a run starts: `local_ranks` processes on each of `nodes` nodes, `world` in all."""

    device: str  # cuda or cpu
    gpus: tuple[str, ...]  # of this node, as CUDA_VISIBLE_DEVICES names them
    local_ranks: int
    nodes: int
    world: int
    slurm: bool = False
    hosts: Mapping[str, int] = field(default_factory=dict)  # of a hostfile: name -> ranks


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this node: those of CUDA_VISIBLE_DEVICES if it is set, else all that nvidia-smi lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(gpu for gpu in chosen.split(",") if gpu)
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line for line in listed.split() if line.isdigit())


def cpu_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port(taken: Collection[int] = ()) -> int:
    """A TCP port that is free now and not in `taken`."""
    while True:
        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        if port not in taken:
            return port


def find_resources(chooses: bool = False) -> Resources:
    """What the environment offers: GPUs, NUM_GPUS, CPU_RANKS, HOSTFILE, a SLURM allocation. Raises UserError."""
    env, gpus = os.environ, visible_gpus()
    if file := env.get("HOSTFILE"):
        hosts = _read_hosts(Path(file), number("NUM_GPUS", 0))
        device = "cpu" if env.get("NUM_GPUS") == "0" else "cuda"  # this machine may be a login node without a GPU
        return Resources(device, gpus, max(hosts.values()), len(hosts), sum(hosts.values()), hosts=hosts)
    slurm = bool(env.get("SLURM_JOB_ID"))
    found, nodes = len(gpus), 1
    if slurm:
        nodes = number("SLURM_JOB_NUM_NODES", number("SLURM_NNODES", 1))
        found = number("SLURM_GPUS_ON_NODE", found)
    ranks = number("NUM_GPUS", found)
    if ranks > found:
        raise UserError(f"NUM_GPUS={ranks}, but this node has {found}")
    device = "cuda" if ranks else "cpu"
    if not (ranks := ranks or number("CPU_RANKS", CPU_RANKS)):
        raise UserError("CPU_RANKS=0: a run needs at least one")
    return Resources(device, gpus[:ranks], ranks, nodes, 1 if chooses else ranks * nodes, slurm)


def number(variable: str, default: int) -> int:
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal():
        raise UserError(f"{variable}={value} is not a number")
    return int(value)


def _read_hosts(file: Path, per_node: int) -> dict[str, int]:
    """The nodes of a hostfile and the ranks on each: its slots, or `per_node` if that is not 0."""
    hosts: dict[str, int] = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"HOSTFILE={file}: {error.strerror}") from None
    for count, line in enumerate(lines, 1):
        if not (words := line.partition("#")[0].split()):
            continue
        if not (found := re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", " ".join(words))) or found[1] in hosts:
            raise UserError(f"HOSTFILE={file}, line {count}: must be 'name slots=8', each name once")
        hosts[found[1]] = per_node or int(found[2])
    if not hosts:
        raise UserError(f"HOSTFILE={file} has no line like 'name slots=8'")
    return hosts
