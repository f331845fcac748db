"""`make gpu` without a GPU: what it runs, what it leaves out and says so."""

import subprocess
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.graphed import use_graph
from helpers.models import pack, sample, tiny_model


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
    assert ran == ["pytest", "pytest", "kernels.bench", "benchmarks.step"]
    said = capsys.readouterr().out
    for line in (
        "deepspeed is not installed",
        "engine tests left out: pip install deepspeed webdataset",
        "kernels failed with status 1",
    ):
        assert line in said
    assert "step done" in said


def test_every_part_is_a_module():
    assert all(find_spec(words[0]) for words, _ in gpu.PARTS.values())


def test_what_is_captured_as_a_graph_is_the_model_with_every_gradient(monkeypatch):
    """A CPU captures nothing: the callable itself stands for its replay, which takes tensors alone."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda net, tensors, allow_unused_input: net)
    model, batch = tiny_model().train(), pack([sample("v", 3, text=7), sample("i", 1, 4), sample("t", text=5)])
    others = pack([sample("w", 3, text=7), sample("j", 1, 4), sample("u", text=5)])
    outcomes = []
    for captured in (False, True):
        if captured:
            use_graph(model, others)
        loss = model(batch, weight=batch.weight)
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        outcomes.append([loss.detach(), *(g for g in found if g is not None)])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)
