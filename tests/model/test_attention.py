"""Attention by sample equals a dense mask, in values and gradients, by whichever call it is made."""

import logging

import pytest
import torch
import torch.nn.functional as nnf
from torch._subclasses import FakeTensorMode

from fovlm.model import attention
from fovlm.model.attention import attend_by_sample, segments, varlen_runs
from helpers.devices import DEVICES
from helpers.models import dense_varlen, pack, sample, tiny_model

SAMPLES = [
    sample("video", frames=3, text=7, prompt=4),
    sample("text", text=5),
    sample("image", frames=1, looks=4, text=6, prompt=3),
]


def dense_mask(layout) -> torch.Tensor:
    """True [M, M] where position i sees position j: the reference."""
    same = layout.segment[:, None] == layout.segment[None, :]
    return same & torch.ones_like(same).tril()


@pytest.fixture(params=["one by one", "varlen"])
def call(request, monkeypatch):
    if request.param == "varlen":
        monkeypatch.setattr(attention, "varlen_runs", lambda device, dtype: True)
        monkeypatch.setattr(attention, "varlen_attn", dense_varlen)
    return request.param


def assert_equals_a_dense_mask(heads, samples, device="cpu", dtype=torch.float64, **tolerance) -> None:
    """Attention by sample in this type, with every gradient, against a dense mask in float64."""
    H, G = heads
    layout = pack(samples).to(device).sequence
    torch.manual_seed(0)
    inputs = [torch.randn(1, n, len(layout.slot), 64).to(device, dtype).requires_grad_() for n in (H, G, G)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    by_sample = attend_by_sample(*inputs, segments(layout, inputs[0]), 0.1)
    mask = dense_mask(layout)
    dense = nnf.scaled_dot_product_attention(*exact, mask, scale=0.1, enable_gqa=True).transpose(1, 2)
    slope = torch.randn(dense.shape).to(by_sample)
    ours = [by_sample, *torch.autograd.grad(by_sample, inputs, slope)]
    theirs = [dense, *torch.autograd.grad(dense, exact, slope.double())]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[1:2]], ids=["mixed", "text"])
def test_it_equals_a_dense_mask_with_every_gradient(call, heads, samples):
    assert_equals_a_dense_mask(heads, samples)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_varlen_on_a_gpu_equals_a_dense_mask(heads, dtype, device):
    assert varlen_runs(torch.device(device, 0), dtype)
    assert_equals_a_dense_mask(heads, SAMPLES, f"{device}:0", dtype, rtol=2e-2, atol=2e-2)


def test_the_nll_and_its_gradients_are_those_of_a_dense_mask(call, monkeypatch):
    batch = pack(SAMPLES)

    def dense(query, key, value, pack_segments, scale):
        layout = batch.sequence if query.shape[2] == len(batch.sequence.slot) else batch.prefix
        mask = dense_mask(layout)
        return nnf.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True).transpose(1, 2)

    def outcome():
        model = tiny_model()
        nll = model(batch)
        (nll * batch.weight).sum().backward()
        return [nll.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    by_sample = outcome()
    monkeypatch.setattr("fovlm.model.kv_cache.attend_by_sample", dense)
    for ours, theirs in zip(by_sample, outcome(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_no_mask_of_positions_by_positions_is_made(monkeypatch):
    made = []
    monkeypatch.setattr(
        "fovlm.model.kv_cache.attend_by_sample",
        lambda query, key, value, pack_segments, scale: made.append(pack_segments) or query.transpose(1, 2),
    )
    monkeypatch.setattr("fovlm.model.kv_cache.mask_of", None)
    tiny_model()(pack(SAMPLES))
    assert len(made) == 2 * 2, "two layers, over the prefixes and over the whole pack"


def test_the_segments_cover_the_pack_and_padding_is_one_of_them():
    for layout in (pack(SAMPLES).sequence, pack(SAMPLES).prefix, pack([]).sequence):
        assert sum(layout.lengths) == len(layout.slot)
        assert min(layout.lengths) > 0
        bounds = layout.cu_seqlens.tolist()
        assert bounds[: len(layout.lengths)] == [sum(layout.lengths[:n]) for n in range(len(layout.lengths))]
        assert set(bounds[len(layout.lengths) :]) == {len(layout.slot)}
        assert len(bounds) % 32 == 0


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_torch_takes_the_call(heads):
    """Shapes, types and options are those of the installed torch; nothing is computed, so no GPU is needed."""
    H, G = heads
    with FakeTensorMode():
        inputs = [torch.empty(1, n, 40, 64, device="meta", dtype=torch.bfloat16) for n in (H, G, G)]
        bounds = torch.empty(32, dtype=torch.int32, device="meta")
        pack_segments = attention.Segments([40], bounds, 128, varlen=True)
        out = attend_by_sample(*inputs, pack_segments, 0.125)
    assert (out.shape, out.dtype) == ((1, 40, H, 64), torch.bfloat16)


def test_a_device_that_cannot_is_named_once(monkeypatch, caplog):
    def refuse(*args, **options):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    monkeypatch.setattr(attention, "_varlen", refuse)
    varlen_runs.cache_clear()
    with FakeTensorMode(), caplog.at_level(logging.WARNING, "fovlm"):
        for _ in range(2):
            assert not varlen_runs(torch.device("cuda"), torch.bfloat16)
    varlen_runs.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().startswith("attention runs sample by sample: varlen_attn cannot run in torch.bfloat16")
    assert record.getMessage().endswith("RuntimeError: FlashAttention only supports Ampere GPUs or newer. more")


def test_a_cpu_has_none_and_says_nothing(caplog):
    assert not varlen_runs(torch.device("cpu"), torch.float32)
    assert not caplog.records
