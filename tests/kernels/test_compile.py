"""The kernels compile for GPUs that are not here, and keep within a GPU's means."""

import csv
import os
import subprocess
import sys

import pytest

from helpers import ROOT
from kernels.absorbed_attention import shared_memory, stages


def costs(*arguments: str) -> list[dict[str, str]]:
    """The rows of `python -m kernels.compile`, printed; a process of its own, since the interpreter may be on here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))
    done = subprocess.run(
        [sys.executable, "-m", "kernels.compile", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return list(csv.DictReader(done.stdout.splitlines()))


def within_means(row: dict[str, str]) -> None:
    assert int(row["stack"]) == 0, f"registers spill: {row}"
    assert int(row["widest_load"]) == 16, f"no 16-byte loads: {row}"
    assert int(row["shared"]) <= int(row["shared_limit"]), f"too much shared memory: {row}"
    assert int(row["registers"]) <= 255, f"impossible: {row}"
    assert float(row["occupancy"]) > 0, f"no program fits on an SM: {row}"


def asked(width: int, row: dict[str, str]) -> int:
    return shared_memory(width, stages(width, int(row["shared_limit"])))


def test_kernels_compile_for_six_kinds_of_gpus():
    rows = costs("--narrow")
    assert {row["target"] for row in rows} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {row["kernel"] for row in rows} == {
        "query_forward", "query_backward", "absorbed_forward", "absorbed_backward", "absorbed_backward_rows",
    }  # fmt: skip
    for row in rows:
        within_means(row)
        if row["kernel"] == "absorbed_backward":
            assert int(row["shared"]) == asked(384, row), "the formula by which a device is asked"
            assert 0 < int(row["loop"]) < 500, f"not the loop as it was written: {row}"
            assert 0 < int(row["barriers"]) < 8, f"sums across warps in the loop: {row}"


@pytest.mark.slow
def test_every_shape_compiles():
    rows = costs()
    assert len(rows) == 6 * (2 * 2 * 7 + 2 * 3)  # 7 kernels of two widths with one or several looks, 3 in fp32
    for row in rows:
        within_means(row)
        if row["kernel"] == "absorbed_backward":
            assert int(row["shared"]) == asked(384 if "H=6" in row["case"] else 768, row)
