"""Compiling is on trial: where it fails in any way there is one warning, and the plain layers run."""

import functools
import logging

import pytest
import torch

from fovlm.config.schema import ModelSettings
from fovlm.model import attention
from fovlm.model.modeling import FoveatedVLM
from fovlm.train.compiled import compile_on_trial, wants_compiled
from helpers.devices import DEVICES
from helpers.models import dense_varlen, pack, sample, tiny_model


def compiler_fails(graph, inputs):
    raise RuntimeError("no C compiler")


def launch_fails(graph, inputs):
    def run(*arguments):
        raise RuntimeError("CUDA error: invalid argument")

    return run


def wrong_values(graph, inputs):
    def scaled(x):
        return x * 1.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return lambda *arguments: [scaled(x) for x in graph(*arguments)]


@pytest.fixture(autouse=True)
def one_call(monkeypatch):
    """Attention of a pack is one call, as on CUDA in 16 bits: without breaks there is less to compile."""
    monkeypatch.setattr(attention, "varlen_runs", lambda device, dtype: True)
    monkeypatch.setattr(attention, "varlen_attn", dense_varlen)


def outcome(model: FoveatedVLM) -> list[torch.Tensor]:
    batch = pack([sample("v", 3, text=7), sample("i", 1, 4), sample("t", text=5)]).to(model.device)
    loss = model(batch, weight=batch.weight)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "fovlm"]


def tried(backend, caplog, device="cpu", **tolerance) -> tuple[FoveatedVLM, bool]:
    torch._dynamo.reset()
    model = tiny_model().to(device)
    model.compile_layers = functools.partial(model.compile_layers, backend=backend)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "fovlm"):
        stays = compile_on_trial(model, torch.device(device))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()), "a trial leaves no gradient"
    for ours, plain in zip(outcome(model), outcome(tiny_model().to(device)), strict=True):
        torch.testing.assert_close(ours, plain, **tolerance)
    return model, stays


def test_layers_stay_compiled_where_they_compute_the_same(caplog):
    model, stays = tried(lambda graph, inputs: graph.forward, caplog)
    assert stays
    assert not warnings(caplog)
    assert all(layer._compiled_call_impl for layer in model.llm.base_model.layers)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_compiled_on_a_gpu_they_compute_the_same(caplog, device):
    _, stays = tried("inductor", caplog, device, rtol=1e-3, atol=1e-5)
    assert stays
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [(compiler_fails, "no C compiler"), (launch_fails, "invalid argument"), (wrong_values, "loss and gradient norm")],
)
def test_one_warning_and_the_plain_layers_where_it_fails(backend, reason, caplog):
    model, stays = tried(backend, caplog)
    assert not stays
    assert [reason in message for message in warnings(caplog)] == [True]
    assert not any(layer._compiled_call_impl for layer in model.llm.base_model.layers)


def test_it_is_the_default_on_a_gpu_except_with_zero3():
    asked = {
        (given, device, stage): wants_compiled(ModelSettings(compile=given), torch.device(device), stage)
        for given in (None, True, False)
        for device in ("cuda", "cpu")
        for stage in (2, 3)
    }
    assert {key for key, wants in asked.items() if wants and key[0] is None} == {(None, "cuda", 2)}
    assert all(wants is given for (given, *_), wants in asked.items() if given is not None)
