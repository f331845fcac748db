"""docs/own-data.md: its commands run as they stand, on generated pictures; all of them with the marker slow."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from fovlm.config.schema import load
from fovlm.media.encode import encode_jpeg
from helpers import ROOT

PAGE = (ROOT / "docs" / "own-data.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COLOURS = {"red": (230, 30, 30), "green": (20, 200, 40), "blue": (40, 70, 255)}


@pytest.fixture
def project(tmp_path) -> Path:
    """A checkout of its own, and pictures and questions where the first command puts them."""
    for name in ("fovlm", "kernels", "ds_configs", "experiments", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.sh", tmp_path)
    data = tmp_path / "raw" / "easy_vqa" / "data"
    for split, pictures in (("train", 60), ("test", 6)):
        (data / split / "images").mkdir(parents=True)
        rows = []
        for n in range(pictures):
            name, colour = list(COLOURS.items())[n % 3]
            (data / split / "images" / f"{n}.png").write_bytes(encode_jpeg(np.full((64, 64, 3), colour, np.uint8)))
            rows += [["what color is the shape?", name, n], ["is it red?", "yes" if name == "red" else "no", n]]
        (data / split / "questions.json").write_text(json.dumps(rows))
    (data / "answers.txt").write_text("\n".join([*COLOURS, "yes", "no"]))
    return tmp_path


def run(commands: list[str], project: Path) -> list[str]:
    """What each command prints; fails when one does."""
    (project / "bin").mkdir(exist_ok=True)
    (project / "bin" / "fovlm").write_text('#!/bin/sh\nexec python -m fovlm "$@"\n')
    (project / "bin" / "fovlm").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("FOVLM_")} | {
        "PATH": f"{project / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(project), "CPU_RANKS": "1",
        "FOVLM_PYTHON": shutil.which("python") or "python",
    }  # fmt: skip
    printed = []
    for command in commands:
        done = subprocess.run(["bash", "-ec", command], cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, command + done.stdout + done.stderr
        printed.append(done.stdout)
    return printed


def test_ten_commands_and_an_experiment_of_ten_lines():
    assert len(COMMANDS) == 10
    written = re.search(r"experiments/easy.yaml <<'END'\n(.*?)END", PAGE, re.DOTALL)
    assert written is not None
    assert written[1].count("\n") <= 10
    assert yaml.safe_load(written[1])["runs"]["easy"]["note"]


def test_the_commands_up_to_the_training(project):
    _, prepared, val, _ = run([*COMMANDS[1:4], COMMANDS[5]], project)
    assert prepared.splitlines()[1].split()[1:3] == ["60", "60"]  # samples and frames: a sample for each picture
    assert val.splitlines()[1].split()[1:3] == ["6", "6"]
    experiment = load("easy", folder=project / "experiments")
    assert experiment.data.mixture == {"easy": 1}


@pytest.mark.slow
def test_all_commands(project):
    *_, trained, _, answer, scores = run([*COMMANDS[1:4], *COMMANDS[5:]], project)  # its pictures are all alike
    assert "val" in trained
    assert answer.strip().splitlines()[-1].strip()
    assert "mvbench/blind" in scores
