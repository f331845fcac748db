"""The launcher's command: deepspeed on one machine and on the nodes of a hostfile, srun in a SLURM allocation."""

import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fovlm.errors import UserError, did_you_mean
from fovlm.launch.request import Request
from fovlm.launch.resources import Resources, cpu_cores, free_port, number
from fovlm.paths import TRAIN

# What the nodes of a hostfile get of the environment.
FORWARDED = re.compile(r"(FOVLM|HF|TORCH|TRITON|WANDB|OMP|MPL|NCCL|GLOO|CUDA|DS|PYTHON|LD_LIBRARY_PATH)[A-Z0-9_]*$")
# A task of srun: torch's names of its rank (env:// rendezvous), then the command.
SLURM_TASK = 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'


def command_of(request: Request, where: Resources) -> tuple[list[str], dict[str, str]]:
    """The launcher's command, and its environment."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // where.local_ranks)))
    env.setdefault("OMP_WAIT_POLICY", "passive")  # as for the other commands
    port = str(number("MASTER_PORT", 0) or free_port())
    if where.slurm:
        env |= {"MASTER_ADDR": env.get("MASTER_ADDR") or _first_node(), "MASTER_PORT": port}
        task = ["sh", "-c", SLURM_TASK, "task", sys.executable, "-u", "-m", "fovlm.train", *request.words]
        return [*_srun(where), *request.options, *task], env
    if not (deepspeed := shutil.which("deepspeed")):
        raise UserError(f"no command deepspeed on the PATH: start runs with {TRAIN}, or activate its environment")
    if where.hosts and request.chooses:
        raise UserError("the hostfile says where to run: change it, or NUM_GPUS, in place of the options after --")
    if request.options:
        check_options(request.options)
    command = [deepspeed, "--module", "--no_local_rank", "--log_level", "critical", "--master_port", port]
    if where.hosts:
        command += ["--master_addr", env.get("MASTER_ADDR") or next(iter(where.hosts))]
        env = {key: value for key, value in os.environ.items() if FORWARDED.match(key)}
    elif not request.chooses:
        on_cpu = ["--num_gpus", str(where.local_ranks)]
        command += on_cpu if where.device == "cpu" else ["--include", f"localhost:{','.join(where.gpus)}"]
        env.pop("CUDA_VISIBLE_DEVICES", None)  # it would override this choice
    return [*command, *request.options, "fovlm.train", *request.words], env


def check_options(options: tuple[str, ...]) -> None:
    """Raise UserError for an option after `--` that the deepspeed launcher does not have."""
    if not (package := find_spec("deepspeed")) or not package.origin:
        return
    # Its source is searched: importing it takes seconds.
    known = re.findall(r"""["'](--?\w+)["']""", (Path(package.origin).parent / "launcher" / "runner.py").read_text())
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("-") and not any(other.startswith(name) for other in known):
            raise UserError(f"after --: no option {name}{did_you_mean(name, known)}; deepspeed --help shows all")


def _srun(where: Resources) -> list[str]:
    command = ["srun", f"--nodes={where.nodes}", f"--ntasks={where.local_ranks * where.nodes}"]
    command += [f"--ntasks-per-node={where.local_ranks}", "--kill-on-bad-exit=1"]
    if cores := number("SLURM_CPUS_ON_NODE", 0):
        command.append(f"--cpus-per-task={max(1, cores // where.local_ranks)}")
    if os.environ.get("SLURM_STEP_ID"):
        command.append("--overlap")  # started from a shell that is itself a step
    return command


def _first_node() -> str:
    query = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")]
    with suppress(OSError, IndexError):
        return subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    return socket.gethostname()
