"""launch.sh with stand-ins for the launchers: what would run, in which environment, and with which status it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fovlm.config import schema
from helpers import ROOT
from helpers.launch import TREE, Place


def test_without_a_gpu_two_ranks_run_on_the_cpu(place):
    program, args, env = place.recorded("quickstart", "optim.clip=0.5")
    assert program == "deepspeed"
    assert args[args.index("--num_gpus") + 1] == "2"
    assert args[-3:] == ["fovlm.train", "quickstart", "optim.clip=0.5"]
    assert {"--module", "--no_local_rank"} <= set(args)
    assert int(args[args.index("--master_port") + 1]) > 1023
    assert env["DS_ACCELERATOR"] == "cpu"
    assert env["OMP_WAIT_POLICY"] == "passive"
    assert int(env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert Path(env["TRITON_CACHE_DIR"]).is_relative_to(place.folder / "cache")
    assert Path(env["HF_HOME"]).is_relative_to(place.folder / "cache")


def test_all_gpus_are_used_and_num_gpus_takes_the_first(place):
    place.gpus(4)
    _, args, env = place.recorded("hunt")
    assert args[args.index("--include") + 1] == "localhost:0,1,2,3"
    assert "DS_ACCELERATOR" not in env
    assert int(env["FOVLM_LAUNCHER"]) > 1
    _, args, _ = place.recorded("hunt", NUM_GPUS="2")
    assert args[args.index("--include") + 1] == "localhost:0,1"
    _, args, env = place.recorded("hunt", CUDA_VISIBLE_DEVICES="3,1")
    assert args[args.index("--include") + 1] == "localhost:3,1"
    assert "CUDA_VISIBLE_DEVICES" not in env
    _, args, env = place.recorded("hunt", NUM_GPUS="0")
    assert env["DS_ACCELERATOR"] == "cpu"


def test_what_follows_two_dashes_goes_to_the_launcher_and_wins(place):
    place.gpus(4)
    _, args, _ = place.recorded("hunt", "--", "--include", "localhost:2", "--master_port", "1234")
    assert args.count("--include") == 1
    assert args[-6:] == ["--include", "localhost:2", "--master_port", "1234", "fovlm.train", "hunt"]


def test_inside_slurm_it_starts_itself_one_task_per_gpu(place):
    place.program("scontrol", "#!/bin/sh\necho first\necho second\n")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}
    program, args, env = place.recorded("hunt", "--", "--exclusive", **slurm)
    assert program == "srun"
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(args)
    task = ["task", sys.executable, "-u", "-m", "fovlm.train", "hunt"]
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
        (["hunt", "optim.lr_lm=1"], "did you mean 'lr_llm'?"),
        (["hunt", "--fast"], "unknown option --fast"),
        (["hunt", "LR2"], "one run at a time"),
        (["hunt", "train.steps"], "a setting is section.key=value"),
        (["hunt", "deepspeed=zero9"], "did you mean 'zero"),
        (["hunt", "--", "--num_gups=2"], "after --: no option --num_gups (did you mean '--num_gpus'?)"),
    ],
)
def test_mistakes_are_one_line_and_status_2_before_anything_starts(place, arguments, expected):
    done = place.launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fovlm: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"NUM_GPUS": "4"}, "NUM_GPUS=4, but this node has 2"),
        ({"NUM_GPUS": "0", "CPU_RANKS": "0"}, "CPU_RANKS=0: a run needs at least one"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x is not a number"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(place, env, says):
    place.gpus(2)
    done = place.launch("hunt", **env)
    assert (done.returncode, done.stderr) == (2, f"fovlm: {says}\n")


def test_the_list_has_every_run_and_imports_neither_torch_nor_pydantic(place):
    code = "import sys; from fovlm.launch.main import main; main(['--list']); "
    code += "print(set(sys.modules) & {'torch', 'pydantic'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"
    listed = place.launch("--list").stdout
    assert listed.splitlines() == done.stdout.splitlines()[:-1]
    assert [line.split()[0] for line in listed.splitlines()] == (ROOT / "tests/golden/names.txt").read_text().split()


def test_settings_that_differ_from_those_of_the_run_are_reported_at_once(place):
    checkpoint = place.folder / "runs" / "hunt" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "experiment.yaml").write_text(schema.load("hunt").dump())
    runs = {"FOVLM_RUNS": str(place.folder / "runs")}
    place.recorded("hunt", "train.log_every=7", **runs)  # not of the result
    done = place.launch("hunt", "optim.clip=0.5", "train.seed=3", **runs)
    assert (done.returncode, done.stdout) == (2, "")
    assert "made under other settings: optim.clip=0.5 (was 1.0), train.seed=3 (was 0): undo the change" in done.stderr
    place.recorded("hunt", "optim.clip=0.5", "name=other", **runs)


def test_resume_is_an_override(place):
    _, args, _ = place.recorded("hunt", "--resume", "none")
    assert args[-2:] == ["hunt", "train.resume=none"]


@pytest.mark.parametrize(
    ("status", "ends_with", "says"),
    [("7", 7, "hunt failed (status 7)"), ("75", 75, "hunt saved and stopped"), ("247", 137, "killed by signal 9")],
)
def test_the_status_of_the_run_comes_through_with_a_last_line(place, status, ends_with, says):
    done = place.launch("hunt", "optim.clip=0.5", STATUS=status)
    assert done.returncode == ends_with
    assert says in done.stderr.splitlines()[-1]
    assert done.stderr.endswith("./launch.sh hunt optim.clip=0.5\n")


def test_a_mistake_that_the_run_itself_reports_needs_no_second_line(place):
    done = place.launch("hunt", STATUS="2")
    assert (done.returncode, done.stderr) == (2, "")


def signalled(place: Place, number: signal.Signals, **env: str) -> tuple[int, str, str]:
    """(status, output, errors) of a run that gets a signal when its rank has started."""
    place.program("deepspeed", TREE.format(python=sys.executable))
    command = [str(ROOT / "launch.sh"), "hunt"]
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
    assert err.splitlines()[-1].startswith("fovlm: hunt stopped before the first step;")


def test_a_signal_before_the_ranks_are_started_is_no_failure(place):
    place.program("nvidia-smi", "#!/bin/sh\nkill -HUP $PPID\nsleep 30\n")
    done = place.launch("hunt")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "fovlm: hunt stopped before the first step; the same command starts it again\n"


def test_a_second_interrupt_kills(place):
    place.program("deepspeed", TREE.format(python=sys.executable).replace("os._exit(75)", "0"))
    with subprocess.Popen(
        [str(ROOT / "launch.sh"), "hunt"], env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "training\n"
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "saved\n"
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 137
    assert said.splitlines()[-1].startswith("fovlm: hunt stopped at once; from the last good checkpoint, to resume:")


def test_under_nohup_a_closed_terminal_stops_nothing(place):
    place.program("deepspeed", TREE.format(python=sys.executable))
    command = ["nohup", str(ROOT / "launch.sh"), "hunt"]
    with subprocess.Popen(command, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "training\n"
        run.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=0.5)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) == 75


def test_a_launcher_that_dies_first_leaves_nobody_behind(place):
    place.program("deepspeed", TREE.format(python=sys.executable))
    done = place.launch("hunt", LEAVE="1")
    assert done.returncode == 1
    assert "the launcher ended before its ranks" in done.stderr


def test_help_is_the_head_of_the_script(place):
    done = place.launch("hunt", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ./launch.sh NAME")
    assert "set -u" not in done.stdout


def test_all_that_a_run_lacks_is_reported_in_one_line(place):
    empty = {"HF_HUB_OFFLINE": "1", "FOVLM_MODELS": "/m", "FOVLM_DATA": "/d"}
    done = place.launch("LR1", "model.llm=folder/of/a/model", **empty)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    models = "model.llm=folder/of/a/model, model.encoder=facebook/dinov2-small: no folder here or below /m"
    assert all(lacking in done.stderr for lacking in (models, "/d/openvid/", "/d/smoltalk/", "/d/val/"))
