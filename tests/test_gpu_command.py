"""`make gpu` without a GPU: what it runs, what it leaves out and says so."""

import subprocess
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that torch can use"):
        gpu.main()


def test_missing_packages_leave_parts_out_and_a_failure_does_not_end_the_rest(monkeypatch, capsys):
    ran = []

    def run(command, check):
        ran.append(command[2])
        return SimpleNamespace(returncode=int(command[2] == "kernels.bench"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("webdataset", "deepspeed") else object())
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main() == 1
    assert ran == ["kernels.bench", "benchmarks.step"]
    said = capsys.readouterr().out
    for line in (
        "deepspeed is not installed",
        "tests left out: pip install webdataset",
        "kernels failed with status 1",
    ):
        assert line in said
    assert "step done" in said


def test_every_part_is_a_module():
    assert all(find_spec(words[0]) for words, _ in gpu.PARTS.values())
