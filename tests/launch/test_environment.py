"""What launch.sh does before there is a Python environment."""

import shutil
import subprocess

import pytest

from helpers import ROOT

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


def test_a_python_that_is_too_old_is_reported(fresh):
    status, said, asked = fresh("--list", old=1, says=", found 3.9.18")
    assert (status, asked) == (2, [])
    assert (
        said == "fovlm: requires Python 3.10 or newer (3.11 is best), found 3.9.18: install it, or set FOVLM_PYTHON\n"
    )


def test_no_name_needs_no_environment(fresh):
    assert fresh()[0] == 2
    assert not (fresh.folder / ".venv").exists()
