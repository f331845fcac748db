"""Query attention with the projections of keys and values absorbed: it reads the hidden state itself, once.

With the plain form's key = W_k z + b_k and value = W_v z + b_v of z = gamma * x + beta, x the layer-norm-normalised
hidden state [F,N,D], and W_k,h, W_v,h the rows [d,D] of head h (all sums over n run over the frame of look k):

    u[k,h]      = gamma * (W_k,h^T query[k,h])
    s[k,h,n]    = scale * <u[k,h], x[f,n]>          the terms of beta and b_k do not depend on n: softmax drops them
    pooled[k,h] = sum_n softmax(s)[k,h,n] x[f,n]
    out[k,h]    = W_v,h (gamma * pooled[k,h] + beta) + b_v,h

Everything but the pooling is small (no N in it) and plain PyTorch; the pooling is the kernel. It is attention with
x as keys and as values of all heads at once, so the heads of a frame's looks fill the rows of a tensor-core tile.
Backward, with g = d loss / d pooled, delta[k,h] = <g[k,h], pooled[k,h]> and ds = p (<g, x> - delta):

    du[k,h] = scale * sum_n ds[k,h,n] x[f,n]        dx[f,n] = sum_k,h p[k,h,n] g[k,h] + scale * ds[k,h,n] u[k,h]

in one pass over x; dx is not computed for a frozen encoder. No atomics: the same bits in every run.

Shapes: F frames, K looks, N patches + CLS, H heads, d head width, D = H*d. Sums are in fp32 (fp64 for fp64 inputs).
Relative RMS error against float64: 1e-5 in fp32, 1e-2 in bf16 for the pooling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.common import (
    LOG2E,
    accumulator,
    check_looks,
    dense_rows,
    dot,
    group_looks,
    jit,
    load_rows,
    tl,
    uses_triton,
)

ROWS = 16  # (look, head) pairs that share one read of a frame: the smallest tile of tl.dot


def reference(
    folded: Tensor, hidden: Tensor, frame_of_look: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The pooling in plain PyTorch: folded u [K,H,D], hidden x [F,N,D] -> (pooled [K,H,D], lse [K,H])."""
    if frame_of_look is not None:
        hidden = hidden.index_select(0, frame_of_look)
    scores = (folded @ hidden.transpose(1, 2)).to(accumulator(folded.dtype)) * scale  # [K,H,N]
    return scores.softmax(-1).to(hidden.dtype) @ hidden, scores.logsumexp(-1)


@jit
def _load_tile(base, number, fits, D1: tl.constexpr, D2: tl.constexpr):
    """Rows `number` of a [K*H,D] array in two pieces of power-of-two width: D = D1 + D2, D2 may be 0."""
    at = base + number[:, None] * (D1 + D2)
    first = tl.load(at + tl.arange(0, D1)[None, :], mask=fits[:, None], other=0.0)
    second = first
    if D2 > 0:
        second = tl.load(at + D1 + tl.arange(0, D2)[None, :], mask=fits[:, None], other=0.0)
    return first, second


@jit
def _store_tile(base, number, fits, first, second, D1: tl.constexpr, D2: tl.constexpr):
    """The opposite of `_load_tile`."""
    at = base + number[:, None] * (D1 + D2)
    tl.store(at + tl.arange(0, D1)[None, :], first.to(base.dtype.element_ty), mask=fits[:, None])
    if D2 > 0:
        tl.store(at + D1 + tl.arange(0, D2)[None, :], second.to(base.dtype.element_ty), mask=fits[:, None])


@jit
def _dot_rows(left1, left2, right1, right2, D2: tl.constexpr):
    """[R,D], [B,D] -> [R,B], both operands in two pieces."""
    product = dot(left1, tl.trans(right1))
    if D2 > 0:
        product += dot(left2, tl.trans(right2))
    return product


@jit
def _numbers(tile, end, look_of, H, ONE: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers in [K*H] of the (look, head) pairs tile .. tile + ROWS of a frame, and which of them are real."""
    place = tile + tl.arange(0, ROWS)
    fits = place < end
    if ONE:
        return place, fits
    else:
        return tl.load(look_of + place // H, mask=fits, other=0) * H + place % H, fits


@jit
def _forward_block(
    top, total, acc1, acc2, u1, u2, x, row, x_row, N, scale2,
    D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of rows in the online softmax (base 2): `top` the largest score so far, the others its sums."""
    x1 = load_rows(x, row, x_row, N, D1, MASKED)
    x2 = x1
    if D2 > 0:
        x2 = load_rows(x + D1, row, x_row, N, D2, MASKED)
    scores = _dot_rows(u1, u2, x1, x2, D2) * scale2
    if MASKED:
        scores = tl.where((row < N)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    acc1 = acc1 * shrink[:, None] + dot(weights.to(x1.dtype), x1)
    if D2 > 0:
        acc2 = acc2 * shrink[:, None] + dot(weights.to(x2.dtype), x2)
    return new_top, total * shrink + tl.sum(weights, 1), acc1, acc2


@jit
def _forward_kernel(
    u, x, look_of, first, pooled, lse, scale2, N, H, x_frame, x_row,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: all heads of all looks at one frame. scale2 = scale * log2(e)."""
    frame = tl.program_id(0)
    x += frame.to(tl.int64) * x_frame
    begin = (frame if ONE else tl.load(first + frame)) * H
    end = (frame + 1 if ONE else tl.load(first + frame + 1)) * H
    for tile in range(begin, end, ROWS):
        number, fits = _numbers(tile, end, look_of, H, ONE, ROWS)
        u1, u2 = _load_tile(u, number, fits, D1, D2)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc1 = tl.zeros([ROWS, D1], tl.float32)
        acc2 = tl.zeros([ROWS, D2 if D2 > 0 else 1], tl.float32)
        for start in range(0, N - N % BLOCK, BLOCK):
            row = start + tl.arange(0, BLOCK)
            top, total, acc1, acc2 = _forward_block(
                top, total, acc1, acc2, u1, u2, x, row, x_row, N, scale2, D1, D2, False
            )
        if TAIL > 0:
            row = N - N % BLOCK + tl.arange(0, TAIL)
            top, total, acc1, acc2 = _forward_block(
                top, total, acc1, acc2, u1, u2, x, row, x_row, N, scale2, D1, D2, True
            )
        _store_tile(pooled, number, fits, acc1 / total[:, None], acc2 / total[:, None], D1, D2)
        tl.store(lse + number, (top + tl.log2(total)) / LOG2E, mask=fits)


@jit
def _load_pairs(u, grad, pooled, lse, number, fits, D1: tl.constexpr, D2: tl.constexpr):
    """What the backward pass needs of a tile of (look, head) pairs: u, g, lse in base 2, delta."""
    u1, u2 = _load_tile(u, number, fits, D1, D2)
    g1, g2 = _load_tile(grad, number, fits, D1, D2)
    p1, p2 = _load_tile(pooled, number, fits, D1, D2)
    delta = tl.sum(g1.to(tl.float32) * p1.to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(g2.to(tl.float32) * p2.to(tl.float32), 1)
    return u1, u2, g1, g2, tl.load(lse + number, mask=fits, other=0.0) * LOG2E, delta


@jit
def _backward_tile(
    u1, u2, g1, g2, lse2, delta, x1, x2, dx1, dx2, row, N, scale,
    D2: tl.constexpr, MASKED: tl.constexpr, NEED_X: tl.constexpr,
):  # fmt: skip
    """A tile of (look, head) pairs meets a block of rows: -> scale * ds, and dx with the tile's share added."""
    weights = tl.exp2(_dot_rows(u1, u2, x1, x2, D2) * (scale * LOG2E) - lse2[:, None])
    if MASKED:
        weights = tl.where((row < N)[None, :], weights, 0.0)
    dscores = (weights * (_dot_rows(g1, g2, x1, x2, D2) - delta[:, None]) * scale).to(x1.dtype)
    if NEED_X:
        weights = weights.to(x1.dtype)
        dx1 += dot(tl.trans(weights), g1) + dot(tl.trans(dscores), u1)
        if D2 > 0:
            dx2 += dot(tl.trans(weights), g2) + dot(tl.trans(dscores), u2)
    return dscores, dx1, dx2


@jit
def _backward_block(
    du1, du2, u1, u2, g1, g2, lse2, delta, u, x, look_of, grad, pooled, lse, du, dx, begin, end, row, x_row, N, H,
    scale, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr, ONE: tl.constexpr, SINGLE: tl.constexpr,
    NEED_X: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of rows: writes its dx; -> the sum of du of a single tile of pairs, or adds to du in memory."""
    x1 = load_rows(x, row, x_row, N, D1, MASKED)
    dx1 = tl.zeros(x1.shape, tl.float32)
    x2, dx2 = x1, dx1
    if D2 > 0:
        x2 = load_rows(x + D1, row, x_row, N, D2, MASKED)
        dx2 = tl.zeros(x2.shape, tl.float32)
    if SINGLE:
        dscores, dx1, dx2 = _backward_tile(
            u1, u2, g1, g2, lse2, delta, x1, x2, dx1, dx2, row, N, scale, D2, MASKED, NEED_X
        )
        du1 += dot(dscores, x1)
        if D2 > 0:
            du2 += dot(dscores, x2)
    else:
        for tile in range(begin, end, ROWS):
            number, fits = _numbers(tile, end, look_of, H, ONE, ROWS)
            v1, v2, h1, h2, tile_lse2, tile_delta = _load_pairs(u, grad, pooled, lse, number, fits, D1, D2)
            dscores, dx1, dx2 = _backward_tile(
                v1, v2, h1, h2, tile_lse2, tile_delta, x1, x2, dx1, dx2, row, N, scale, D2, MASKED, NEED_X
            )
            # only this program adds to these pairs; the barrier shows the sum to the threads of the next block
            sum1, sum2 = _load_tile(du, number, fits, D1, D2)
            sum1 += dot(dscores, x1)
            if D2 > 0:
                sum2 += dot(dscores, x2)
            _store_tile(du, number, fits, sum1, sum2, D1, D2)
            tl.debug_barrier()
    if NEED_X:
        _store_tile(dx, row.to(tl.int64), row < N, dx1, dx2, D1, D2)
    return du1, du2


@jit
def _backward_kernel(
    grad, u, x, pooled, lse, look_of, first, du, dx, scale, N, H, x_frame, x_row,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ONE: tl.constexpr,
    SINGLE: tl.constexpr, NEED_X: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: one frame, all its looks and heads; one pass over its rows. dx is dense [F,N,D]."""
    frame = tl.program_id(0)
    x += frame.to(tl.int64) * x_frame
    dx += frame.to(tl.int64) * N * (D1 + D2)
    begin = (frame if ONE else tl.load(first + frame)) * H
    end = (frame + 1 if ONE else tl.load(first + frame + 1)) * H
    number, fits = _numbers(begin, end, look_of, H, ONE, ROWS)
    u1, u2, g1, g2, lse2, delta = _load_pairs(u, grad, pooled, lse, number, fits, D1, D2)
    du1 = tl.zeros([ROWS, D1], tl.float32)
    du2 = tl.zeros([ROWS, D2 if D2 > 0 else 1], tl.float32)
    for start in range(0, N - N % BLOCK, BLOCK):
        row = start + tl.arange(0, BLOCK)
        du1, du2 = _backward_block(
            du1, du2, u1, u2, g1, g2, lse2, delta, u, x, look_of, grad, pooled, lse, du, dx, begin, end, row, x_row,
            N, H, scale, D1, D2, False, ONE, SINGLE, NEED_X, ROWS,
        )  # fmt: skip
    if TAIL > 0:
        row = N - N % BLOCK + tl.arange(0, TAIL)
        du1, du2 = _backward_block(
            du1, du2, u1, u2, g1, g2, lse2, delta, u, x, look_of, grad, pooled, lse, du, dx, begin, end, row, x_row,
            N, H, scale, D1, D2, True, ONE, SINGLE, NEED_X, ROWS,
        )  # fmt: skip
    if SINGLE:
        _store_tile(du, number, fits, du1, du2, D1, D2)


def pieces(width: int) -> tuple[int, int]:
    """A row of D numbers as two pieces of power-of-two width (384 = 256 + 128); (0, 0) where that does not go."""
    first = 1 << (width.bit_length() - 1)
    second = width - first
    fits = 16 <= width <= 1024 and (second == 0 or (second >= 16 and second & (second - 1) == 0))
    return (first, second) if fits else (0, 0)


def tiles(rows: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks of rows for a frame of `rows` rows: full blocks, and a smaller one (16 at least) for what is left."""
    block = 16 if dtype == torch.float32 or width > 512 else 32
    rest = rows % block
    tail = 0 if rest == 0 else max(1 << (rest - 1).bit_length(), 16)
    first, second = pieces(width)
    warps = 8 if width > 512 else 4
    return {
        "D1": first, "D2": second, "BLOCK": block, "TAIL": tail, "ROWS": ROWS,
        "num_warps": warps, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


@torch.library.custom_op("fovlm_kernels::absorbed_pooling", mutates_args=())
def _forward(
    folded: Tensor, hidden: Tensor, look_of: Tensor | None, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward kernel -> (pooled [K,H,D], lse [K,H] fp32). look_of, first: as group_looks gives them."""
    (looks, heads, width), (frames, rows) = folded.shape, hidden.shape[:2]
    folded, hidden = folded.contiguous(), dense_rows(hidden)
    pooled = torch.empty_like(folded)
    lse = torch.empty((looks, heads), dtype=torch.float32, device=folded.device)
    if first is not None:  # a look at a frame that does not exist belongs to no program
        pooled.fill_(float("nan"))
        lse.fill_(float("nan"))
    if frames and looks:
        _forward_kernel[(frames,)](
            folded, hidden, look_of, first, pooled, lse, scale * 1.4426950408889634, rows, heads,
            *hidden.stride()[:2], ONE=first is None, **tiles(rows, width, hidden.dtype),
        )  # fmt: skip
    return pooled, lse


@_forward.register_fake
def _(folded, hidden, look_of, first, scale):
    pooled = torch.empty_like(folded, memory_format=torch.contiguous_format)
    return pooled, folded.new_empty(folded.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fovlm_kernels::absorbed_pooling_backward", mutates_args=())
def _backward(
    grad: Tensor, folded: Tensor, hidden: Tensor, pooled: Tensor, lse: Tensor,
    look_of: Tensor | None, first: Tensor | None, scale: float, need_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The backward kernel -> (dfolded, dhidden); the latter is empty [0] unless need_hidden."""
    (looks, heads, width), (frames, rows) = folded.shape, hidden.shape[:2]
    grad, folded, hidden = grad.contiguous(), folded.contiguous(), dense_rows(hidden)
    single = first is None and heads <= ROWS
    dfolded = torch.zeros(folded.shape, dtype=torch.float32, device=folded.device)
    if single:
        dfolded = torch.empty_like(folded)
    dhidden = torch.empty(hidden.shape if need_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    if frames and (need_hidden or looks):
        _backward_kernel[(frames,)](
            grad, folded, hidden, pooled, lse, look_of, first, dfolded, dhidden, scale, rows, heads,
            *hidden.stride()[:2], ONE=first is None, SINGLE=single, NEED_X=need_hidden,
            **tiles(rows, width, hidden.dtype),
        )  # fmt: skip
    return dfolded.to(folded.dtype), dhidden


@_backward.register_fake
def _(grad, folded, hidden, pooled, lse, look_of, first, scale, need_hidden):
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    return torch.empty_like(folded, memory_format=torch.contiguous_format), dhidden


def _save(ctx, inputs, output):
    folded, hidden, look_of, first, ctx.scale = inputs
    ctx.save_for_backward(folded, hidden, *output, look_of, first)


def _autograd(ctx, grad, _grad_lse):
    folded, hidden, pooled, lse, look_of, first = ctx.saved_tensors
    need_hidden = ctx.needs_input_grad[1]
    dfolded, dhidden = _backward(grad, folded, hidden, pooled, lse, look_of, first, ctx.scale, need_hidden)
    return dfolded, dhidden if need_hidden else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save)


def absorbed_pooling(
    folded: Tensor, hidden: Tensor, frame_of_look: Tensor | None, scale: float, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Every look pools its frame's rows, once per head -> (pooled [K,H,D], lse [K,H] in fp32 without gradient).

    folded [K,H,D] and hidden [F,N,D] (any strides; no copy while the last is 1) of one floating type and device;
    frame_of_look and implementation as in `query_attention`. Raises ValueError for what does not fit.
    """
    shapes = f"folded {list(folded.shape)}, hidden {list(hidden.shape)}"
    if folded.ndim != 3 or hidden.ndim != 3 or folded.shape[2] != hidden.shape[2]:
        raise ValueError(f"absorbed_attention: expected folded [K,H,D], hidden [F,N,D]; got {shapes}")
    if 0 in hidden.shape[1:] or folded.shape[1] == 0:
        raise ValueError(f"absorbed_attention: N, H and D must be 1 or more; got {shapes}")
    check_looks("absorbed_attention", folded, hidden, frame_of_look)
    if not uses_triton("absorbed_attention", implementation, folded, pieces(hidden.shape[2])[0] > 0):
        pooled, lse = reference(folded, hidden, frame_of_look, scale)
        return pooled, lse.detach()
    look_of, first = (None, None) if frame_of_look is None else group_looks(frame_of_look, hidden.shape[0])
    pooled, lse = _forward(folded, hidden, look_of, first, scale)
    return pooled, lse.detach()


def absorbed_attention(
    query: Tensor,
    hidden: Tensor,
    frame_of_look: Tensor | None,
    scale: float,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    implementation: str = "auto",
) -> Tensor:
    """What `query_attention` gives for the keys and values of layer-normalised rows, from the rows -> [K,H,d].

    query [K,H,d]; hidden x [F,N,D], normalised to mean 0 and variance 1 but without the norm's weight and bias,
    which are norm_weight, norm_bias [D]; key_weight, value_weight [H*d,D] and key_bias, value_bias [H*d] or None, as
    in nn.Linear. frame_of_look and implementation as in `query_attention`. key_bias gets the gradient zero.

    Raises ValueError for shapes, types or devices that do not fit.
    """
    heads, width = query.shape[1:] if query.ndim == 3 else (0, 0)
    weight = (heads * width, hidden.shape[-1])
    if key_weight.shape != weight or value_weight.shape != weight:
        raise ValueError(
            f"absorbed_attention: expected query [K,H,d] and weights [H*d,D]; got query {list(query.shape)}, hidden "
            f"{list(hidden.shape)}, weights {list(key_weight.shape)} and {list(value_weight.shape)}"
        )
    # [H,K,d] @ [H,d,D]: one product per head, then looks first again
    folded = (query.transpose(0, 1) @ key_weight.unflatten(0, (heads, width))).transpose(0, 1) * norm_weight
    pooled, _ = absorbed_pooling(folded, hidden, frame_of_look, scale, implementation=implementation)
    values = (pooled * norm_weight + norm_bias).transpose(0, 1) @ value_weight.unflatten(0, (heads, width)).mT
    out = values.transpose(0, 1)
    if value_bias is not None:
        out = out + value_bias.unflatten(0, (heads, width))
    if key_bias is not None:  # softmax drops it; this keeps the parameter in the graph, with the zero it deserves
        out = out + 0.0 * key_bias.unflatten(0, (heads, width))
    return out
