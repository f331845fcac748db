"""Query attention: the reference against its definition, the kernels against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.devices import DEVICES
from helpers.kernel_tools import DEVICE, TOLERANCE, TYPES, assert_close, needs_triton, poisoned, results
from kernels.common import ON_CPU, group_looks
from kernels.query_attention import (
    _backward,
    _forward,
    query_attention,
    reference,
)


def draw(looks, frames, rows, heads, width, dtype=torch.float32, seed=0):
    """query, key, value, slope: random, and exact in this type."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(looks, heads, width), (frames, rows, heads, width), (frames, rows, heads, width), (looks, heads, width)]
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def check(looks, frames, rows, heads, width, frame_of_look, dtype, scale=0.125, limit=None, inputs=None):
    """Kernel forward and every gradient against the reference in float64."""
    *leaves, slope = inputs or draw(looks, frames, rows, heads, width, dtype)
    where = None if frame_of_look is None else torch.tensor(frame_of_look, dtype=torch.int64, device=DEVICE)

    def run(implementation):
        return lambda q, k, v: query_attention(q, k, v, where, scale, implementation=implementation)

    with poisoned():
        got = results(run("triton"), leaves, slope, dtype)
    want = results(run("reference"), leaves, slope, torch.float64)
    for name, mine, theirs in zip(("out", "dquery", "dkey", "dvalue"), got, want):
        assert mine.dtype == dtype
        assert_close(mine, theirs, limit or TOLERANCE[dtype], f"{name} of {rows} rows, width {width}, {dtype}")


def test_reference_is_the_definition():
    query, key, value, _ = draw(3, 2, 5, 2, 4, torch.float64)
    frames = [1, 0, 1]
    out, lse = reference(query, key, value, torch.tensor(frames, device=DEVICE), 0.3)
    for k, f in enumerate(frames):
        for h in range(2):
            scores = 0.3 * key[f, :, h] @ query[k, h]
            p = scores.exp() / scores.exp().sum()
            torch.testing.assert_close(out[k, h], p @ value[f, :, h])
            torch.testing.assert_close(lse[k, h], scores.exp().sum().log())


def test_no_frames_given_means_one_look_per_frame_and_gradients_are_right():
    query, key, value, _ = (t.requires_grad_() for t in draw(3, 3, 5, 2, 4, torch.float64))
    each = torch.arange(3, device=DEVICE)
    torch.testing.assert_close(
        query_attention(query, key, value, None, 0.3), query_attention(query, key, value, each, 0.3)
    )
    assert torch.autograd.gradcheck(lambda *t: query_attention(*t, None, 0.3), (query, key, value))
    assert torch.autograd.gradcheck(lambda *t: query_attention(*t, each[[2, 2, 0]], 0.3), (query, key, value))


@pytest.mark.parametrize("where", [[2, 0, 2, 4, 0, 2], [0, 0, 1, 1, 3], [4], [0, 1, 2, 3, 4]])
def test_looks_by_frame_are_looks_one_by_one(where):
    """Runs of frames with equally many looks, frames without any, looks in any order; no frame is copied."""
    query, key, value, slope = draw(len(where), 5, 7, 2, 4, torch.float64)
    frames = torch.tensor(where, device=DEVICE)

    def one_by_one(q, k, v):
        return query_attention(q, k[frames], v[frames], None, 0.3, implementation="reference")

    def by_frame(q, k, v):
        return query_attention(q, k, v, frames, 0.3, implementation="reference")

    want = results(one_by_one, [query, key, value], slope, torch.float64)
    for mine, theirs in zip(results(by_frame, [query, key, value], slope, torch.float64), want):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the kernel runs, and the reference copies")
def test_several_looks_copy_no_keys_on_a_cpu():
    query, key, value, _ = (t.requires_grad_() for t in draw(8, 2, 64, 2, 32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        query_attention(query, key, value, torch.arange(8) // 4, 0.3)
    large = {t.untyped_storage().data_ptr() for t in saved if t.untyped_storage().nbytes() >= key.nbytes}
    assert large == {t.untyped_storage().data_ptr() for t in (key, value)}


def test_keys_with_the_strides_of_a_wider_array():
    query, _, _, _ = draw(3, 3, 5, 2, 4)
    both = torch.randn(3, 6, 2, 2, 4, device=DEVICE)
    key, value = both[:, :5].unbind(2)
    want = query_attention(query, key.contiguous(), value.contiguous(), None, 0.3)
    torch.testing.assert_close(query_attention(query, key, value, None, 0.3), want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(3, 2, 5)}, r"\[K,H,d\]"),
        ({"query": torch.zeros(3, 8)}, r"\[K,H,d\]"),
        ({"value": torch.zeros(3, 6, 2, 4)}, r"\[F,N,H,d\]"),
        ({"query": torch.zeros(2, 2, 4)}, "2 looks at 3 frames need frame_of_look"),
        ({"query": torch.zeros(3, 2, 4, dtype=torch.float64)}, "one floating type"),
        ({"query": torch.zeros(3, 2, 4, device="meta")}, "one device"),
        ({"key": torch.zeros(3, 0, 2, 4), "value": torch.zeros(3, 0, 2, 4)}, "1 or more"),
        ({"frame_of_look": torch.tensor([0, 1])}, "frame_of_look int32 or int64"),
        ({"frame_of_look": torch.tensor([0.0, 1.0, 2.0])}, "frame_of_look int32 or int64"),
        ({"frame_of_look": torch.tensor([0, 1, 3])}, "from 0 to 3, there are 3 frames"),
        ({"frame_of_look": torch.tensor([0, 1, -1])}, "from -1 to 1"),
        ({"implementation": "cuda"}, "expected one of auto, triton, reference"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    fits = {"query": torch.zeros(3, 2, 4), "key": torch.zeros(3, 5, 2, 4), "value": torch.zeros(3, 5, 2, 4)}
    with pytest.raises(ValueError, match=words):
        query_attention(**({"frame_of_look": None, "scale": 1.0} | fits | change))


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("looks", "frames"), [(0, 0), (0, 3)])
def test_empty_gives_empty_and_zero_gradients(implementation, looks, frames):
    query, key, value, slope = draw(looks, frames, 5, 2, 32)
    none = torch.zeros(looks, dtype=torch.int64, device=DEVICE)

    def run(q, k, v):
        return query_attention(q, k, v, none, 0.3, implementation=implementation)

    with poisoned():
        out, dquery, dkey, dvalue = results(run, [query, key, value], slope, torch.float32)
    assert out.shape == dquery.shape == query.shape
    assert dkey.shape == dvalue.shape == key.shape
    assert not dkey.any()
    assert not dvalue.any()


@pytest.mark.skipif(DEVICE == "cuda", reason="where there is no GPU")
def test_triton_on_the_cpu_needs_the_interpreter():
    if ON_CPU:
        pytest.skip("the interpreter is here")
    with pytest.raises(ValueError, match="needs a GPU"):
        query_attention(*draw(1, 1, 5, 2, 32)[:3], None, 0.3, implementation="triton")


@needs_triton
@pytest.mark.parametrize("rows", [1, 2, 31, 63, 64, 65, 256, 257, 1370])
@pytest.mark.parametrize("frame_of_look", [None, [0]])
def test_odd_numbers_of_rows(rows, frame_of_look):
    check(1, 1, rows, 1, 64, frame_of_look, torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("frame_of_look", [None, [0, 0, 2]])
def test_types_and_widths(dtype, width, frame_of_look):
    check(3, 3, 37, 2, width, frame_of_look, dtype)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("frame_of_look", [None, [f for f in range(16) for _ in range(8)]], ids=["one", "eight"])
def test_dinov2_base_at_its_size(frame_of_look, device):
    count = len(frame_of_look or range(16))
    check(count, 16, 257, 12, 64, frame_of_look, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize(
    ("frames", "frame_of_look"),
    [(3, []), (2, [1]), (4, [2, 0, 2, 2, 0, 0, 2]), (2, [1] * 16), (2, [0] * 3 + [1] * 17), (1, [0] * 35)],
)
def test_looks_share_frames(frames, frame_of_look):
    for dtype in (torch.float32, torch.bfloat16):
        check(len(frame_of_look), frames, 33, 2, 32, frame_of_look, dtype)


@needs_triton
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    frames, rows, heads = (data.draw(st.integers(1, top)) for top in (3, 100, 2))
    width, dtype = data.draw(st.sampled_from([16, 32, 64, 128, 256])), data.draw(st.sampled_from(TYPES))
    frame_of_look = data.draw(st.none() | st.lists(st.integers(0, frames - 1), max_size=20))
    looks = frames if frame_of_look is None else len(frame_of_look)
    check(looks, frames, rows, heads, width, frame_of_look, dtype, scale=width**-0.5)


@needs_triton
@pytest.mark.parametrize("frame_of_look", [None, [1, 0]])
def test_large_logits(frame_of_look):
    # Scores of +-1e4: one of them carries 1e4 * 2**-24 of rounding, which the exponential turns into 1e-3.
    query, key, value, slope = draw(2, 2, 70, 1, 32)
    scores = torch.einsum("khd,fnhd->kfnh", query, key)
    query *= 1e4 / 0.125 / scores.abs().max()
    check(2, 2, 70, 1, 32, frame_of_look, torch.float32, limit=5e-3, inputs=[query, key, value, slope])


@needs_triton
@pytest.mark.parametrize("frame_of_look", [None, [1, 0]])
def test_scores_far_below_zero(frame_of_look):
    # Rows behind the last one would have the score 0 and weigh exp(200) here.
    query, key, value, slope = draw(2, 2, 35, 1, 32)
    query, key = query.abs() + 1, -key.abs() - 1
    query *= -200 / 0.125 / torch.einsum("khd,fnhd->kfnh", query, key).max()
    check(2, 2, 35, 1, 32, frame_of_look, torch.float32, limit=1e-3, inputs=[query, key, value, slope])


@needs_triton
def test_a_look_at_no_frame_is_nan():
    query, key, value, _ = draw(3, 2, 5, 2, 32)
    groups = group_looks(torch.tensor([1, 2, -1], device=DEVICE), 2)  # past the check, as on a GPU
    out, lse = _forward(query, key, value, *groups, 0.3)
    torch.testing.assert_close(out[:1], query_attention(query[:1], key[1:], value[1:], None, 0.3))
    assert out[1:].isnan().all()
    assert lse[1:].isnan().all()


@needs_triton
@pytest.mark.parametrize("frame_of_look", [None, [1, 0]])
def test_one_hot_attention(frame_of_look):
    query, key, value, _ = draw(2, 2, 65, 1, 64)
    key[:, 64] = query[frame_of_look or [0, 1]] * 100  # the row behind the full blocks
    out = query_attention(
        query, key, value, frame_of_look and torch.tensor(frame_of_look, device=DEVICE), 1.0, implementation="triton"
    )
    torch.testing.assert_close(out, value[frame_of_look or [0, 1], 64], rtol=1e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("frame_of_look", [None, [1, 1, 0]])
def test_log_sum_exp_strides_and_frozen_frames(frame_of_look):
    query, _, _, slope = draw(3, 3, 1, 2, 32)
    both = torch.randn(3, 41, 2, 2, 32, device=DEVICE)
    key, value = both[:, :40].unbind(2)
    where = None if frame_of_look is None else torch.tensor(frame_of_look, device=DEVICE)
    query.requires_grad_()
    with poisoned():
        groups = (None, None) if where is None else group_looks(where, 3)
        out, lse = _forward(query, key, value, *groups, 0.3)
        (dquery,) = torch.autograd.grad(out, query, slope)
    want, want_lse = reference(*(t.double() for t in (query, key, value)), where, 0.3)
    assert_close(out, want, 1e-5, "out")
    assert_close(lse, want_lse, 1e-5, "lse")
    (want_dquery,) = torch.autograd.grad(want, query, slope.double())
    assert_close(dquery, want_dquery.double(), 1e-5, "dquery")


@needs_triton
@pytest.mark.parametrize("frame_of_look", [None, [1, 1, 0]])
def test_two_backward_passes_are_bit_equal(frame_of_look):
    *leaves, slope = draw(3, 3, 40, 2, 32)
    where = None if frame_of_look is None else torch.tensor(frame_of_look, device=DEVICE)

    def run(q, k, v):
        return query_attention(q, k, v, where, 0.3, implementation="triton")

    first, second = (results(run, leaves, slope, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_triton
def test_torch_compile_keeps_it_in_the_graph_and_the_registration_is_sound():
    query, key, value, slope = draw(3, 3, 20, 2, 32)
    look_of, first = group_looks(torch.tensor([1, 1, 0], device=DEVICE), 3)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    torch.library.opcheck(_forward, (*leaves, look_of, first, 0.3))
    out, lse = _forward(query, key, value, look_of, first, 0.3)
    torch.library.opcheck(_backward, (slope, query, key, value, out, lse, look_of, first, 0.3, True))
    whole = torch.compile(
        lambda *t: query_attention(*t, None, 0.3, implementation="triton"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        whole(query, key, value), query_attention(query, key, value, None, 0.3, implementation="triton")
    )


def test_the_reference_compiles_without_graph_breaks():
    query, key, value, _ = draw(3, 3, 5, 2, 4)
    each = torch.tensor([0, 0, 2], device=DEVICE)
    whole = torch.compile(lambda *t: query_attention(*t, 0.3), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(query, key, value, each), query_attention(query, key, value, each, 0.3))
