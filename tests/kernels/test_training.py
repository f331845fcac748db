"""A model learns the same with the kernels as without them: the whole curve, not one step."""

import json
import os

import pytest
import torch

from benchmarks.memory import experiment, pack
from fovlm.estimate.shapes import geometry
from fovlm.model.build import build
from fovlm.train.losses import text_loss
from helpers import ROOT
from helpers.devices import DEVICES
from helpers.kernel_curve import use
from helpers.launch import fresh_python

STEPS = 10


def assert_same(curves: dict[str, list[float]], tolerance: float) -> None:
    for step, (got, want) in enumerate(zip(curves["triton"], curves["reference"], strict=True)):
        assert abs(got - want) <= tolerance * want, f"step {step}: {got} with the kernels, {want} without"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves: the test below")
def test_a_tiny_model_learns_the_same_under_the_interpreter():
    """fp32, one look and several at a frame, both forms: within 1e-5 of the loss at every step of AdamW.

    Attention that is wrong by 1 %, in one form alone, moves this curve by 1e-3, and a gradient wrong by 10 % by 4e-4.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = "import sys; from helpers.kernel_curve import both; both(int(sys.argv[1]))"
    curves = json.loads(fresh_python(code, str(STEPS), env=environment))
    assert len(curves["triton"]) == STEPS
    assert curves["triton"][-1] < 0.8 * curves["triton"][0], "and it learns"
    assert_same(curves, 1e-5)


def real_curve(implementation: str, steps: int, device: str) -> list[float]:
    """SmolLM2-135M and DINOv2-small of random weights, in bf16."""
    use(implementation)
    e = experiment("135M bf16")
    torch.manual_seed(0)
    model = build(e.model).to(device, torch.bfloat16).train()
    batch = pack(e, geometry(e.model).llm.V, 1).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(steps):
        loss = text_loss(model(batch), batch).total / batch.weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_real_size_model_learns_the_same_on_a_gpu(device):
    """bf16: within 1 % of the loss at every step."""
    curves = {implementation: real_curve(implementation, STEPS, device) for implementation in ("reference", "triton")}
    use("auto")
    assert_same(curves, 1e-2)
