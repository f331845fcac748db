"""`./launch.sh NAME ...`: check the run, find GPUs or nodes, start the ranks, pass signals on, report how it ended.

launch.sh makes the Python environment and runs `python -m fovlm.launch` in it. One machine and a HOSTFILE use the
deepspeed launcher, a SLURM allocation uses srun. No torch here, and no pydantic for `--list`.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fovlm.config import experiments
from fovlm.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from fovlm.paths import ROOT, cache_root

SCRIPT = ROOT / "launch.sh"
CPU_RANKS = 2  # processes where there is no GPU
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE = 5.0  # seconds for the ranks to end after their launcher
# Options of deepspeed that choose nodes or GPUs themselves.
CHOOSES = re.compile(r"--?(i|e|H|include|exclude|num_gpus|num_nodes|num_accelerators|hostfile)(=|$)")
# Other nodes get only the variables that deepspeed's environment file lists.
FORWARDED = re.compile(r"(FOVLM|HF|TORCH|TRITON|WANDB|OMP|MPL)[A-Z_]*$")


@dataclass(frozen=True)
class Request:
    """A parsed command line: `words` are the run's name and its overrides, `options` are for the launcher."""

    words: tuple[str, ...]
    options: tuple[str, ...] = ()
    list_runs: bool = False
    dry_run: bool = False

    @property
    def chooses(self) -> bool:
        """Whether the launcher's options say where to run; the number of ranks is then unknown here."""
        return any(CHOOSES.match(option) for option in self.options)


@dataclass(frozen=True)
class Resources:
    """Where a run starts: `local_ranks` processes on each of `nodes` nodes, `world` in all."""

    device: str  # cuda or cpu
    gpus: tuple[str, ...]  # of this node, as CUDA_VISIBLE_DEVICES names them
    local_ranks: int
    nodes: int
    world: int
    slurm: bool = False
    hostfile: str = ""


class Stopped(Exception):
    """A signal came before the ranks were started."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows the usage")


def parse(words: list[str]) -> Request:
    """The request of a command line. Raises UserError."""
    split = words.index("--") if "--" in words else len(words)
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume")
    known, unknown = parser.parse_known_intermixed_args(words[:split])
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; --help shows all (options of the launcher come after --)")
    names = [word for word in known.words if "=" not in word]
    overrides = [word for word in known.words if "=" in word]
    if known.resume is not None:
        overrides.append(f"train.resume={known.resume}")
    if len(names) > 1 and "." in names[1]:
        raise UserError(f"'{names[1]}': a setting is section.key=value")
    if len(names) > 1:
        raise UserError(f"'{names[1]}': one run at a time, and '{names[0]}' was given (fovlm run starts several)")
    if not names and not known.list:
        raise UserError("which run? ./launch.sh --list shows all; ./launch.sh quickstart is a good first")
    return Request((*names, *overrides), tuple(words[split + 1 :]), known.list, known.dry_run)


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
    hostfile = env.get("HOSTFILE", "")
    slurm = bool(env.get("SLURM_JOB_ID")) and not hostfile
    found, nodes = len(gpus), 1
    if slurm:
        nodes = _number("SLURM_JOB_NUM_NODES", _number("SLURM_NNODES", 1))
        found = _number("SLURM_GPUS_ON_NODE", found)
    ranks = _number("NUM_GPUS", found)
    if hostfile:
        world = 1 if chooses else _world_of(Path(hostfile), _number("NUM_GPUS", 0))
        return Resources("cuda", gpus, max(ranks, 1), nodes, world, hostfile=hostfile)
    if ranks > found:
        raise UserError(f"NUM_GPUS={ranks}, but this node has {found}")
    device = "cuda" if ranks else "cpu"
    ranks = ranks or _number("CPU_RANKS", CPU_RANKS)
    return Resources(device, gpus[:ranks], ranks, nodes, 1 if chooses else ranks * nodes, slurm)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal():
        raise UserError(f"{variable}={value} is not a number")
    return int(value)


def _world_of(hostfile: Path, per_node: int) -> int:
    """The ranks of a hostfile: the sum of its slots, or `per_node` for each node if that is not 0."""
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"HOSTFILE={hostfile}: {error.strerror}") from None
    slots = [int(found.group(1)) for line in lines if (found := re.match(r"[^#]*\bslots=(\d+)", line))]
    if not sum(slots):
        raise UserError(f"HOSTFILE={hostfile} has no line like 'name slots=8'")
    return per_node * len(slots) if per_node else sum(slots)


def command_of(request: Request, where: Resources) -> tuple[list[str], dict[str, str]]:
    """The launcher's command, and its environment."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // where.local_ranks)))
    port = env.get("MASTER_PORT") or str(free_port())
    if where.slurm:
        env |= {"MASTER_ADDR": env.get("MASTER_ADDR") or _first_node(), "MASTER_PORT": port}
        task = ["scripts/slurm_task.sh", sys.executable, "-u", "-m", "fovlm.train", *request.words]
        return [*_srun(where), *request.options, *task], env
    if not (deepspeed := shutil.which("deepspeed")):
        raise UserError("no command deepspeed on the PATH: start runs with ./launch.sh, or activate its environment")
    command = [deepspeed, "--module", "--no_local_rank", "--log_level", "critical", "--master_port", port]
    if where.hostfile:
        command += ["--hostfile", where.hostfile]
        if env.get("NUM_GPUS") and not request.chooses:
            command += ["--num_gpus", env["NUM_GPUS"]]
        file = Path(env.setdefault("DS_ENV_FILE", str(cache_root() / "deepspeed_env")))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{key}={value}\n" for key, value in env.items() if FORWARDED.match(key)))
    elif not request.chooses:
        on_cpu = ["--num_gpus", str(where.local_ranks)]
        command += on_cpu if where.device == "cpu" else ["--include", f"localhost:{','.join(where.gpus)}"]
        env.pop("CUDA_VISIBLE_DEVICES", None)  # it would override this choice
    return [*command, *request.options, "fovlm.train", *request.words], env


def _srun(where: Resources) -> list[str]:
    command = ["srun", f"--nodes={where.nodes}", f"--ntasks={where.local_ranks * where.nodes}"]
    command += [f"--ntasks-per-node={where.local_ranks}", "--kill-on-bad-exit=1"]
    if cores := _number("SLURM_CPUS_ON_NODE", 0):
        command.append(f"--cpus-per-task={max(1, cores // where.local_ranks)}")
    if os.environ.get("SLURM_STEP_ID"):
        command.append("--overlap")  # started from a shell that is itself a step
    return command


def _first_node() -> str:
    query = ["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")]
    with suppress(OSError, IndexError):
        return subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    return socket.gethostname()


def say(text: str) -> None:
    """A line on stderr; a terminal that is gone is no error."""
    with suppress(OSError):
        print(f"fovlm: {text}", file=sys.stderr, flush=True)


class Run:
    """A started launcher in a session of its own, so that a signal reaches the ranks once, from here.

    Ranks save and stop on SIGTERM. The deepspeed launcher would leave them behind on one node, and kill them after
    30 seconds on several.
    """

    def __init__(self, command: list[str], env: dict[str, str], remote: bool):
        self.remote, self.stop_asked = remote, False
        early: list[int] = []
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: early.append(number))
        self.launcher = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        if early:
            self._pass_on(early[0], None)

    def wait(self) -> int:
        """Wait until every process has ended; returns the exit status as a shell counts it (128 + signal)."""
        status = self.launcher.wait()
        until = time.monotonic() + GRACE
        while (left := self._left_behind()) and time.monotonic() < until:
            time.sleep(0.2)
        if left:
            self._signal_group(signal.SIGKILL)
            if status == 0:
                say("the launcher ended before its ranks, which were killed")
                return 1
        if status >= 192:  # deepspeed's 256 - signal
            status -= 256
        return 128 - status if status < 0 else status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop_asked:
            self._signal_group(signal.SIGKILL)
            return
        self.stop_asked = True
        say("saving, then stopping" + (" (again: stop at once)" if number == signal.SIGINT else ""))
        passed = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        if self.remote:
            with suppress(ProcessLookupError):
                self.launcher.send_signal(passed)
        elif not self._signal_ranks(passed):
            self._signal_group(signal.SIGTERM)

    def _signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to the ranks, which are the children of the launcher's children. False: there is none yet."""
        import psutil

        try:
            ranks = [rank for node in psutil.Process(self.launcher.pid).children() for rank in node.children()]
        except psutil.Error:
            return False
        for rank in ranks:
            with suppress(psutil.Error):
                rank.send_signal(number)
        return bool(ranks)

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, number)

    def _left_behind(self) -> bool:
        """Whether a process of the session lives. Zombies do not count: a container may have nobody to reap them."""
        import psutil

        try:
            os.killpg(self.launcher.pid, 0)
        except ProcessLookupError:
            return False
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, PermissionError, psutil.Error):
                if os.getpgid(process.pid) == self.launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False


def last_line(request: Request, status: int) -> str:
    """What to say after a run that ended with `status`; empty when the run said everything itself."""
    words = [word for word in request.words if not word.startswith("train.resume=")]  # what is saved now is newer
    again = f"to resume: {shlex.join(['./launch.sh', *words])}"
    if status in (0, EXIT_USER_ERROR):
        return ""
    if status == EXIT_STOPPED:
        return f"{words[0]} saved and stopped; {again}"
    cause = ": a rank was killed by signal 9, often because memory ran out" if status == 137 else ", see above"
    return f"{words[0]} failed (status {status}){cause}; from the last good checkpoint, {again}"


def launch(request: Request) -> int:
    """Check a run and train it to its end; returns the exit status. Raises UserError before anything starts."""
    from fovlm.config import deepspeed, schema

    where = find_resources(request.chooses)
    deepspeed.resolve(schema.load(request.words[0], list(request.words[1:])), where.world, where.device)
    if where.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if request.dry_run:
        os.environ["WORLD_SIZE"] = str(where.world)
        os.execv(sys.executable, [sys.executable, "-m", "fovlm.train", *request.words, "--dry-run"])
    run = Run(*command_of(request, where), remote=where.slurm or bool(where.hostfile))
    status = run.wait()
    if run.stop_asked and not run.remote and status - 128 in SIGNALS:  # the ranks had no handler yet
        raise Stopped
    if line := last_line(request, status):
        say(line)
    return status


def main(words: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a mistake that one line explains, 75 when a signal stopped the run."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped

    words = sys.argv[1:] if words is None else words
    try:
        request = parse(words)
        if request.list_runs:
            notes = experiments.names().items()
            print("\n".join(f"{run:{max(len(run) for run, _ in notes)}}  {note}" for run, note in notes))
            return 0
        for number in SIGNALS:
            signal.signal(number, stop)
        return launch(request)
    except Stopped:
        say(f"{request.words[0]} stopped before the first step; the same command starts it again")
        return EXIT_STOPPED
    except UserError as error:
        say(str(error))
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
