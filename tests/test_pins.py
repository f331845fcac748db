"""What scripts/check_pins.sh reports, with stand-ins for uv (`make pins` runs it for real)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_SOLUTION = "error: No solution found when resolving dependencies"
NO_INDEX = "error: Request failed after 3 retries\\n  cause: Failed to fetch: https://index/simple/torch/"


@pytest.mark.parametrize(
    ("uv", "status", "line"),
    [
        ("exit 0", 0, "pins resolve: Linux aarch64, Python 3.13"),
        (f"echo '{NO_SOLUTION}' >&2; exit 1", 1, "the pins do not resolve for Linux x86_64, Python 3.10"),
        (f"printf '{NO_INDEX}' >&2; exit 2", 0, "warning: the package index cannot be reached"),
        ("echo 'error: unknown option' >&2; exit 2", 1, "unknown option"),
        ('[ -z "$UV_FIND_LINKS$PIP_FIND_LINKS" ] && exit 0; exit 1', 0, "pins resolve"),
    ],
)
def test_an_unresolvable_pin_fails_and_an_unreachable_index_is_a_warning(tmp_path, uv, status, line):
    (tmp_path / "scripts").mkdir()
    for name in ("check_pins.sh", "env.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    version = next(row[3:] for row in (ROOT / "scripts" / "check_pins.sh").read_text().splitlines() if row[:3] == "UV=")
    program = tmp_path / ".cache" / f"uv-venv-{version}" / "bin" / "uv"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{uv}\n")
    program.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PIP_FIND_LINKS": "/wheels", "UV_FIND_LINKS": "/wheels"}
    command = [str(tmp_path / "scripts" / "check_pins.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert line in done.stdout + done.stderr
