"""What `pip install fovlm` gives: everything that a checkout has, from any folder, and nothing called `kernels`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

NOISE = dict.fromkeys(("PYTHONPATH", "FOVLM_PYTHON", "FOVLM_DATA", "FOVLM_MODELS", "FOVLM_RUNS", "FOVLM_CACHE"))


def run(command: list[str | Path], folder: Path, **env: str) -> str:
    """The output of a command in a folder, without this checkout on the path; fails when it does."""
    env = {key: value for key, value in os.environ.items() if key not in NOISE} | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the source distribution of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    tree = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in tree:
        if (ROOT / name).is_file():
            (out / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (out / "tree" / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out], out / "tree")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", out, *out.glob("fovlm-*.tar.gz")], out)
    return next(out.glob("fovlm-*.whl"))


def test_a_wheel_is_the_whole_product(wheel, tmp_path):
    """Installed beside the packages of this environment."""
    site, folder = tmp_path / "site", tmp_path / "empty"
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], tmp_path)
    assert {path.name for path in site.iterdir()} == {"fovlm", "bin", next(site.glob("fovlm-*.dist-info")).name}
    (folder / "experiments").mkdir(parents=True)
    own = "base: quickstart.yaml\nruns: {mine: {note: one of my own, train: {steps: 3}}}"
    (folder / "experiments" / "own.yaml").write_text(own)
    fovlm = [sys.executable, "-m", "fovlm"]
    listed = [line.split()[0] for line in run([*fovlm, "train", "--list"], folder, PYTHONPATH=str(site)).splitlines()]
    names = (ROOT / "tests" / "golden" / "names.txt").read_text().split()
    assert sorted(listed) == sorted([*names, "mine"])
    # It imports the model, and with it the kernels.
    printed = run([*fovlm, "train", "mine", "--dry-run"], folder, PYTHONPATH=str(site), CPU_RANKS="1")
    assert "steps" in printed
    assert run([*fovlm, "sweep", "mine", "--dry-run", "--jobs", "1"], folder, PYTHONPATH=str(site))
    assert {path.name for path in folder.iterdir()} <= {"experiments", "data", "runs", ".cache"}


@pytest.mark.slow
def test_a_fresh_environment_trains_and_converts_from_an_empty_folder(wheel, tmp_path):
    """Needs the package index. About five minutes."""
    folder, bin_ = tmp_path / "empty", tmp_path / "venv" / "bin"
    folder.mkdir()
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    run([bin_ / "python", "-m", "pip", "install", "-q", wheel], tmp_path)
    small = ["data.generate.train_clips=200", "data.generate.val_clips=20"]
    trained = run([bin_ / "fovlm", "train", "quickstart", "train.steps=20", *small], folder, PATH="/usr/bin:/bin")
    assert "to use the model: fovlm convert" in trained
    assert run([bin_ / "fovlm", "convert", "quickstart", "converted"], folder).strip() == "converted"
    assert {path.name for path in folder.iterdir()} == {"data", "runs", "converted", ".cache"}
