"""launch.sh with stand-ins for the launchers: what would run, in which environment, and with which status it ends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.launch import RECORDER


# Prints its name, arguments and the environment that matters, one a line.
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


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_without_a_gpu_two_ranks_run_on_the_cpu(place):
    program, args, env = place.recorded("quickstart", "optim.clip=0.5")
    assert program == "deepspeed"
    assert args[args.index("--num_gpus") + 1] == "2"
    assert args[-3:] == ["fovlm.train", "quickstart", "optim.clip=0.5"]
    assert {"--module", "--no_local_rank"} <= set(args)
    assert int(args[args.index("--master_port") + 1]) > 1023
    assert env["DS_ACCELERATOR"] == "cpu"
    assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert Path(env["TRITON_CACHE_DIR"]).is_relative_to(place.folder / "cache")
    assert Path(env["HF_HOME"]).is_relative_to(place.folder / "cache")


def test_all_gpus_are_used_and_num_gpus_takes_the_first(place):
    place.gpus(4)
    _, args, env = place.recorded("LR1")
    assert args[args.index("--include") + 1] == "localhost:0,1,2,3"
    assert "DS_ACCELERATOR" not in env
    assert int(env["FOVLM_LAUNCHER"]) > 1
    _, args, _ = place.recorded("LR1", NUM_GPUS="2")
    assert args[args.index("--include") + 1] == "localhost:0,1"
    _, args, env = place.recorded("LR1", CUDA_VISIBLE_DEVICES="3,1")
    assert args[args.index("--include") + 1] == "localhost:3,1"
    assert "CUDA_VISIBLE_DEVICES" not in env
    _, args, env = place.recorded("LR1", NUM_GPUS="0")
    assert env["DS_ACCELERATOR"] == "cpu"


def test_what_follows_two_dashes_goes_to_the_launcher_and_wins(place):
    place.gpus(4)
    _, args, _ = place.recorded("LR1", "--", "--include", "localhost:2", "--master_port", "1234")
    assert args.count("--include") == 1
    assert args[-6:] == ["--include", "localhost:2", "--master_port", "1234", "fovlm.train", "LR1"]


def test_a_hostfile_makes_it_multi_node(place):
    hosts = place.folder / "hosts"
    hosts.write_text("# two nodes\none slots=2\ntwo slots=2\n")
    _, args, env = place.recorded("LR1", HOSTFILE=str(hosts), FOVLM_DATA="/shards")
    assert args[args.index("--hostfile") + 1] == str(hosts)
    assert "--num_gpus" not in args
    assert "FOVLM_DATA=/shards" in Path(env["DS_ENV_FILE"]).read_text().splitlines()
    command = [str(ROOT / "launch.sh"), "LR1"]
    env = {**place.env, "HOSTFILE": "hosts"}  # relative to where the command was typed
    assert f"arg={hosts}\n" in subprocess.run(command, env=env, cwd=place.folder, capture_output=True, text=True).stdout


def test_inside_slurm_it_starts_itself_one_task_per_gpu(place):
    place.program("scontrol", "#!/bin/sh\necho first\necho second\n")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}
    program, args, env = place.recorded("LR1", "--", "--exclusive", **slurm)
    assert program == "srun"
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(args)
    task = ["task", sys.executable, "-u", "-m", "fovlm.train", "LR1"]
    assert args[args.index("sh") - 1] == "--exclusive"
    assert args[-6:] == task
    assert env["MASTER_ADDR"] == "first"
    assert env["MASTER_PORT"].isdigit()
    task = [*args[args.index("sh") : args.index("task") + 1], "env"]
    ranks = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "PATH": place.env["PATH"]}
    seen = subprocess.run(task, env=ranks, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"RANK=5", "WORLD_SIZE=8", "LOCAL_RANK=1"} <= set(seen)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "which run?"),
        (["LR11"], "did you mean 'LR1'?"),
        (["LR1", "optim.lr_lm=1"], "did you mean 'lr_llm'?"),
        (["LR1", "--fast"], "unknown option --fast"),
        (["LR1", "LR2"], "one run at a time"),
        (["LR1", "train.steps"], "a setting is section.key=value"),
        (["LR1", "deepspeed=zero9"], "did you mean 'zero"),
        (["LR1", "--", "--fast"], "after --: unrecognized arguments: --fast; deepspeed --help shows its options"),
    ],
)
def test_mistakes_are_one_line_and_status_2_before_anything_starts(place, arguments, expected):
    done = place.launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fovlm: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


def test_more_gpus_than_there_are_is_refused(place):
    place.gpus(2)
    done = place.launch("LR1", NUM_GPUS="4")
    assert (done.returncode, done.stderr) == (2, "fovlm: NUM_GPUS=4, but this node has 2\n")


def test_the_list_has_every_run_and_imports_neither_torch_nor_pydantic(place):
    code = "import sys; from fovlm.launch.main import main; main(['--list']); "
    code += "print(set(sys.modules) & {'torch', 'pydantic'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"
    listed = place.launch("--list").stdout
    assert listed.splitlines() == done.stdout.splitlines()[:-1]
    assert [line.split()[0] for line in listed.splitlines()] == (ROOT / "tests/golden/names.txt").read_text().split()


def test_resume_is_an_override(place):
    _, args, _ = place.recorded("LR1", "--resume", "none")
    assert args[-2:] == ["LR1", "train.resume=none"]


@pytest.mark.parametrize(
    ("status", "ends_with", "says"),
    [("7", 7, "LR1 failed (status 7)"), ("75", 75, "LR1 saved and stopped"), ("247", 137, "killed by signal 9")],
)
def test_the_status_of_the_run_comes_through_with_a_last_line(place, status, ends_with, says):
    done = place.launch("LR1", "optim.clip=0.5", STATUS=status)
    assert done.returncode == ends_with
    assert says in done.stderr.splitlines()[-1]
    assert done.stderr.endswith("./launch.sh LR1 optim.clip=0.5\n")


def test_a_mistake_that_the_run_itself_reports_needs_no_second_line(place):
    done = place.launch("LR1", STATUS="2")
    assert (done.returncode, done.stderr) == (2, "")


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


def signalled(place: Place, number: signal.Signals, **env: str) -> tuple[int, str, str]:
    """(status, output, errors) of a run that gets a signal when its rank has started."""
    place.program("deepspeed", TREE.format(python=sys.executable))
    command = [str(ROOT / "launch.sh"), "LR1"]
    with subprocess.Popen(
        command, env={**place.env, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "training\n"
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    return run.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_they_save(place, number):
    status, out, err = signalled(place, number)
    assert (status, out) == (75, "saved\n")
    assert "saved and stopped" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_the_ranks_can_save_is_no_failure(place, number):
    status, out, err = signalled(place, number, EARLY="1")
    assert (status, out) == (75, "")
    assert err.splitlines()[-1].startswith("fovlm: LR1 stopped before the first step;")


def test_a_signal_before_the_ranks_are_started_is_no_failure(place):
    place.program("nvidia-smi", "#!/bin/sh\nkill -HUP $PPID\nsleep 30\n")
    done = place.launch("LR1")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "fovlm: LR1 stopped before the first step; the same command starts it again\n"


def test_a_second_interrupt_kills(place):
    place.program("deepspeed", TREE.format(python=sys.executable).replace("os._exit(75)", "0"))
    with subprocess.Popen(
        [str(ROOT / "launch.sh"), "LR1"], env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "training\n"
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "saved\n"
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 137
    assert said.splitlines()[-1].startswith("fovlm: LR1 stopped at once; from the last good checkpoint, to resume:")


def test_under_nohup_a_closed_terminal_stops_nothing(place):
    place.program("deepspeed", TREE.format(python=sys.executable))
    command = ["nohup", str(ROOT / "launch.sh"), "LR1"]
    with subprocess.Popen(command, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "training\n"
        run.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=0.5)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) == 75


def test_a_launcher_that_dies_first_leaves_nobody_behind(place):
    place.program("deepspeed", TREE.format(python=sys.executable))
    done = place.launch("LR1", LEAVE="1")
    assert done.returncode == 1
    assert "the launcher ended before its ranks" in done.stderr


# -- the environment --------------------------------------------------------------------------------------------------

# Stands for python3.11, for all that scripts/env.sh asks; the .venv it makes has a python that notes its arguments.
BASE = """#!/bin/sh
case "$*" in
  *version_info*) exit {old} ;;
  *platform*) echo "{says}" ;;
  "-m venv --clear .venv")
    mkdir -p .venv/bin
    printf '#!/bin/sh\\necho "$@" >>asked.txt\\n' >.venv/bin/python
    chmod +x .venv/bin/python ;;
esac
"""
TOOLS = ("bash", "sh", "env", "dirname", "basename", "mkdir", "cat", "cksum", "chmod", "rm", "cut", "flock")


@pytest.fixture
def fresh(tmp_path):
    """A copy of what a fresh checkout starts with, and a PATH that has no Python but the stand-in."""
    (tmp_path / "scripts").mkdir()
    for name in ("launch.sh", "scripts/env.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (tools / tool).symlink_to(found)

    def start(*arguments: str, old: int = 0, says: str = "3.11.9") -> tuple[int, str, list[str]]:
        base = tools / "python3.11"
        base.write_text(BASE.format(old=old, says=says))
        base.chmod(0o755)
        asked = tmp_path / "asked.txt"
        asked.unlink(missing_ok=True)
        done = subprocess.run(
            [str(tmp_path / "launch.sh"), *arguments],
            env={"PATH": str(tools)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = asked.read_text().splitlines() if asked.exists() else []
        return done.returncode, done.stderr, [line for line in lines if line.strip() not in ("", "-c")]

    start.folder = tmp_path
    return start


def test_the_environment_is_made_once_and_again_when_the_pins_change(fresh):
    status, _, asked = fresh("--list")
    assert status == 0
    assert [a.split()[:3] for a in asked] == [["-m", "pip", "install"], ["-m", "fovlm.launch", "--list"]]
    assert asked[0].endswith("-r requirements.txt")
    assert fresh("--list")[2] == ["-m fovlm.launch --list"]
    with (fresh.folder / "requirements.txt").open("a") as pins:
        pins.write("rich==1.0\n")
    assert len(fresh("--list")[2]) == 2


def test_a_python_that_is_too_old_is_told(fresh):
    status, said, asked = fresh("--list", old=1, says=", found 3.9.18")
    assert (status, asked) == (2, [])
    assert (
        said == "fovlm: requires Python 3.10 or newer (3.11 is best), found 3.9.18: install it, or set FOVLM_PYTHON\n"
    )


def test_help_is_the_head_of_the_script(place):
    done = place.launch("LR1", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ./launch.sh NAME")
    assert "set -u" not in done.stdout


def test_no_name_needs_no_environment(fresh):
    assert fresh()[0] == 2
    assert not (fresh.folder / ".venv").exists()
