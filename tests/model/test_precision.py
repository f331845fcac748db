"""What `train.precision: auto` becomes, and that a run keeps what it began with."""

import pytest
import torch

from fovlm.config.existing_run import check_same_settings, settled
from fovlm.model import precision
from fovlm.sweep.select import PlannedRun, run_status
from helpers.experiments import small


@pytest.mark.parametrize(("device", "native"), [("cuda", True), ("cuda", False), ("cpu", True), ("cpu", False)])
def test_auto_is_what_the_device_multiplies_in(device, native, monkeypatch, tmp_path):
    monkeypatch.setenv("FOVLM_RUNS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    became = {asked: precision.settle(small(train={"steps": 1, "precision": asked}), device).train.precision
               for asked in ("auto", "bf16", "fp32")}  # fmt: skip
    assert became == {"auto": "bf16" if native else "fp32", "bf16": "bf16", "fp32": "fp32"}
    tiny = small(model={"llm": {"hidden_size": 8}, "tokenizer": "bytes"})
    assert precision.settle(tiny, device).train.precision == ("bf16" if native and device == "cuda" else "fp32")


def test_a_run_keeps_the_type_that_it_began_with(monkeypatch, tmp_path):
    monkeypatch.setenv("FOVLM_RUNS", str(tmp_path))
    checkpoint = small().run_folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    began = settled(small(), "fp32")
    (checkpoint / "experiment.yaml").write_text(began.dump())
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert precision.settle(small(), "cpu").hash == began.hash
    assert precision.settle(small(train={"steps": 10, "resume": str(checkpoint)}), "cpu").train.precision == "fp32"
    check_same_settings(small())
    assert run_status(PlannedRun("small", "", ("small",), small())) == "resumable"
    bf16 = small(train={"steps": 10, "precision": "bf16"})
    assert run_status(PlannedRun("small", "", ("small",), bf16)) == "stale"
