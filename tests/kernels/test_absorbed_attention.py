"""Absorbed attention: equal to the plain form in float64, the kernels equal to the reference in float64."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.devices import DEVICES
from helpers.kernel_tools import DEVICE, TOLERANCE, TYPES, assert_close, needs_triton, poisoned, results
from kernels import absorbed_attention as absorbed_module
from kernels.absorbed_attention import (
    _backward,
    _forward,
    absorbed_attention,
    absorbed_pooling,
    fits,
    tile_width,
    tiles,
)
from kernels.common import group_looks
from kernels.query_attention import query_attention


def draw(looks, frames, rows, heads, width, dtype=torch.float32, seed=0):
    """folded, hidden, slope: random, exact in this type; scores of about 1 at scale width ** -0.5."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(looks, heads, width), (frames, rows, width), (looks, heads, width)]
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def where(frame_of_look):
    return None if frame_of_look is None else torch.tensor(frame_of_look, dtype=torch.int64, device=DEVICE)


def check(frames, rows, heads, width, frame_of_look, dtype, inputs=None, limit=None):
    """Pooling and every gradient against the reference in float64."""
    looks = frames if frame_of_look is None else len(frame_of_look)
    *leaves, slope = inputs or draw(looks, frames, rows, heads, width, dtype)

    def run(implementation):
        return lambda u, x: absorbed_pooling(u, x, where(frame_of_look), width**-0.5, implementation=implementation)

    with poisoned():
        got = results(run("triton"), leaves, slope, dtype)
    want = results(run("reference"), leaves, slope, torch.float64)
    for name, mine, theirs in zip(("pooled", "dfolded", "dhidden"), got, want):
        assert mine.dtype == dtype
        assert_close(mine, theirs, limit or TOLERANCE[dtype], f"{name} of {rows} rows, width {width}, {dtype}")


@pytest.mark.parametrize("frame_of_look", [None, [0, 0, 2, 0, 2]])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_plain_form_with_every_gradient(frame_of_look, biased):
    frames, rows, heads, d = 3, 9, 2, 4
    width, looks = heads * d, frames if frame_of_look is None else len(frame_of_look)
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()

    query, hidden = leaf(looks, heads, d), leaf(frames, rows, width)
    key, value = leaf(width, width), leaf(width, width)
    key_bias, value_bias = (leaf(width), leaf(width)) if biased else (None, None)
    keys, values = (
        nnf.linear(hidden, w, b).unflatten(2, (heads, d)) for w, b in ((key, key_bias), (value, value_bias))
    )
    plain = query_attention(query, keys, values, where(frame_of_look), 0.3)
    absorbed = absorbed_attention(
        query, hidden, where(frame_of_look), 0.3,
        key_weight=key, key_bias=key_bias, value_weight=value, value_bias=value_bias,
    )  # fmt: skip
    torch.testing.assert_close(absorbed, plain, rtol=1e-10, atol=1e-10)
    leaves = [t for t in (query, hidden, key, value, key_bias, value_bias) if t is not None]
    slope = torch.randn_like(plain)
    for mine, theirs in zip(torch.autograd.grad(absorbed, leaves, slope), torch.autograd.grad(plain, leaves, slope)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folded": torch.zeros(3, 2, 9)}, r"folded \[K,H,D\]"),
        ({"hidden": torch.zeros(3, 0, 8)}, "1 or more"),
        ({"folded": torch.zeros(2, 2, 8)}, "2 looks at 3 frames need frame_of_look"),
        ({"folded": torch.zeros(3, 2, 8, dtype=torch.float64)}, "one floating type"),
        ({"frame_of_look": torch.tensor([0, 1, 3])}, "from 0 to 3"),
        ({"implementation": "fast"}, "expected one of"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    fits = {"folded": torch.zeros(3, 2, 8), "hidden": torch.zeros(3, 5, 8), "frame_of_look": None, "scale": 1.0}
    with pytest.raises(ValueError, match=words):
        absorbed_pooling(**(fits | change))


def test_weights_that_do_not_fit_are_refused():
    vectors = {name: torch.zeros(8) for name in ("key_bias", "value_bias")}
    with pytest.raises(ValueError, match=r"weights \[H\*d,D\]"):
        absorbed_attention(
            torch.zeros(3, 2, 4), torch.zeros(3, 5, 8), None, 1.0,
            key_weight=torch.zeros(8, 8), value_weight=torch.zeros(8, 4), **vectors,
        )  # fmt: skip


def test_widths_that_cut_into_tiles():
    assert {width: tile_width(width) for width in (32, 48, 192, 384, 768, 1152)} == {
        32: 32, 48: 16, 192: 64, 384: 128, 768: 128, 1152: 128,
    }  # fmt: skip
    assert tile_width(40) == tile_width(272) == 0


def test_the_kernel_runs_where_its_shared_memory_fits(monkeypatch):
    """DINOv2-base: two blocks of rows ahead on a card with 163 KiB a program, one with 99 KiB, else the plain form."""
    rows = [torch.zeros(1, 1, width, dtype=torch.bfloat16) for width in (384, 768, 1024)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for kib, ahead in ((48, (0, 0, 0)), (64, (2, 0, 0)), (99, (3, 2, 0)), (163, (3, 3, 2)), (227, (3, 3, 3))):
        monkeypatch.setattr(absorbed_module, "shared_memory_limit", lambda device, kib=kib: 1024 * kib)
        assert tuple(tiles(hidden)["num_stages"] for hidden in rows) == ahead
        assert [fits(hidden) for hidden in rows] == [stages > 0 for stages in ahead]
    assert not fits(rows[0].float())


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("looks", "frames"), [(0, 0), (0, 3)])
def test_empty_gives_empty_and_zero_gradients(implementation, looks, frames):
    folded, hidden, slope = draw(looks, frames, 5, 2, 32)

    def run(u, x):
        return absorbed_pooling(u, x, where([]), 0.3, implementation=implementation)

    with poisoned():
        pooled, dfolded, dhidden = results(run, [folded, hidden], slope, torch.float32)
    assert pooled.shape == dfolded.shape == folded.shape
    assert dhidden.shape == hidden.shape
    assert not dhidden.any()


@needs_triton
@pytest.mark.parametrize("rows", [1, 2, 31, 63, 64, 65, 256, 257, 1370])
def test_odd_numbers_of_rows(rows):
    check(1, rows, 2, 32, None, torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "width"), [(6, 384), (12, 768), (20, 48)])
def test_types_and_widths(dtype, heads, width):
    check(2, 20, heads, width, None, dtype)
    check(2, 20, heads, width, [1, 1, 1], dtype)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("frame_of_look", [None, [f for f in range(16) for _ in range(8)]], ids=["one", "eight"])
def test_dinov2_base_at_its_size(frame_of_look, device):
    check(16, 257, 12, 768, frame_of_look, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize(("frames", "frame_of_look"), [(3, []), (4, [2, 0, 2, 2, 0, 0, 2]), (2, [1] * 16)])
def test_looks_share_frames(frames, frame_of_look):
    check(frames, 33, 3, 32, frame_of_look, torch.float32)


@needs_triton
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    frames, rows, heads = (data.draw(st.integers(1, top)) for top in (3, 80, 18))
    width, dtype = data.draw(st.sampled_from([16, 48, 64, 96, 128])), data.draw(st.sampled_from(TYPES))
    frame_of_look = data.draw(st.none() | st.lists(st.integers(0, frames - 1), max_size=6))
    check(frames, rows, heads, width, frame_of_look, dtype)


@needs_triton
def test_large_logits():
    # As for the plain kernel: rounding a score of 1e4 is worth 1e-3 in its exponential.
    folded, hidden, slope = draw(2, 2, 40, 2, 32)
    folded *= 1e4 * 32**0.5 / torch.einsum("khD,fnD->kfhn", folded, hidden).abs().max()
    check(2, 40, 2, 32, None, torch.float32, inputs=[folded, hidden, slope], limit=5e-3)


@needs_triton
def test_scores_far_below_zero():
    # Rows behind the last one would have the score 0 and weigh exp(200) here.
    folded, hidden, slope = draw(2, 2, 35, 2, 32)
    folded, hidden = folded.abs() + 1, -hidden.abs() - 1
    folded *= -200 * 32**0.5 / torch.einsum("khD,fnD->kfhn", folded, hidden).max()
    check(2, 35, 2, 32, None, torch.float32, inputs=[folded, hidden, slope], limit=1e-3)


@needs_triton
def test_a_look_at_no_frame_is_nan():
    folded, hidden, _ = draw(3, 2, 5, 2, 32)
    pooled, lse = _forward(folded, hidden, *group_looks(where([1, 2, -1]), 2), 0.3)  # past the check, as on a GPU
    torch.testing.assert_close(pooled[:1], absorbed_pooling(folded[:1], hidden[1:], None, 0.3))
    assert pooled[1:].isnan().all()
    assert lse[1:].isnan().all()


@needs_triton
def test_determinism_frozen_frames_and_a_wider_array():
    folded, _, slope = draw(3, 3, 1, 2, 32)
    hidden = torch.randn(3, 41, 64, device=DEVICE)[:, :40, :32]
    for look in (None, [1, 1, 0]):
        leaves = [folded.clone().requires_grad_(), hidden.clone().requires_grad_()]
        with poisoned():
            pooled = absorbed_pooling(*leaves, where(look), 0.3, implementation="triton")
            first, second = (torch.autograd.grad(pooled, leaves, slope, retain_graph=True) for _ in range(2))
            frozen = absorbed_pooling(leaves[0], hidden, where(look), 0.3, implementation="triton")
            (alone,) = torch.autograd.grad(frozen, leaves[0], slope)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        assert torch.equal(frozen, pooled)
        assert torch.equal(alone, first[0])


@needs_triton
def test_torch_compile_keeps_it_in_the_graph_and_the_registration_is_sound():
    folded, hidden, slope = draw(3, 3, 20, 2, 32)
    leaves = [t.clone().requires_grad_() for t in (folded, hidden)]
    groups = group_looks(where([1, 1, 0]), 3)
    torch.library.opcheck(_forward, (*leaves, *groups, 0.3))
    pooled, lse = _forward(folded, hidden, *groups, 0.3)
    torch.library.opcheck(_backward, (slope, folded, hidden, pooled, lse, *groups, 0.3, True))

    def run(u, x):
        return absorbed_pooling(u, x, None, 0.3, implementation="triton")

    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(folded, hidden), run(folded, hidden))
