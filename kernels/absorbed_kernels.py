"""The Triton kernels of `absorbed_attention.py`, which has the formulas."""

from __future__ import annotations

from kernels.common import LOG2E, dot, jit, tl


@jit
def _places(row, stride, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Offsets [C,R,W] of rows [R] of D numbers, cut into C slices of W; and which slices lie inside the row."""
    part = tl.arange(0, C)[:, None, None]
    return row[None, :, None] * stride + part * W + tl.arange(0, W)[None, None, :], part < D // W


@jit
def _load(base, row, fits, stride, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Rows [R] as a tile [C,R,W]; zeros, which cost no reading, where a row does not fit."""
    at, inside = _places(row, stride, D, W, C)
    return tl.load(base + at, mask=inside & fits[None, :, None], other=0.0)


@jit
def _store(base, row, fits, tile, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """The opposite of `_load`, to dense rows."""
    at, inside = _places(row, D, D, W, C)
    tl.store(base + at, tile.to(base.dtype.element_ty), mask=inside & fits[None, :, None])


@jit
def _scores(rows, pairs):
    """[C,B,W], [C,R,W] -> [B,R]: every warp multiplies its slices of D, then the warps add up."""
    return tl.sum(dot(rows, tl.permute(pairs, (0, 2, 1))), 0)


@jit
def _share(weights, rows, C: tl.constexpr):
    """[B,R] -> [C,B,R] in the type of `rows`: every warp takes all weights to its slice of D."""
    return tl.broadcast_to(weights.to(rows.dtype)[None, :, :], (C, weights.shape[0], weights.shape[1]))


@jit
def _pairs(tile, end, look_of, H, ONE: tl.constexpr, ROWS: tl.constexpr):
    """Rows in [K*H] of a frame's (look, head) pairs tile .. tile + ROWS, and which of them are real."""
    place = tile + tl.arange(0, ROWS)
    fits = place < end
    if ONE:
        return place, fits
    else:
        return tl.load(look_of + place // H, mask=fits, other=0) * H + place % H, fits


@jit
def _forward_block(
    top, total, acc, u, x, row, x_row, N, scale2, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """One block of rows in the online softmax (base 2): `top` the largest score so far; `total` and `acc` its sums."""
    rows = _load(x, row, row < N, x_row, D, W, C)
    scores = tl.where((row < N)[:, None], _scores(rows, u) * scale2, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 0))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[None, :])
    acc = acc * shrink[None, :, None] + dot(_share(tl.trans(weights), rows, C), rows)
    return new_top, total * shrink + tl.sum(weights, 0), acc


@jit
def _forward_kernel(
    u, x, look_of, first, pooled, lse, scale2, N, H, x_frame, x_row,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: all heads of all looks at one frame. scale2 = scale * log2(e)."""
    frame = tl.program_id(0)
    x += frame.to(tl.int64) * x_frame
    begin = (frame if ONE else tl.load(first + frame)) * H
    end = (frame + 1 if ONE else tl.load(first + frame + 1)) * H
    for tile in range(begin, end, ROWS):
        pair, fits = _pairs(tile, end, look_of, H, ONE, ROWS)
        pair_u = _load(u, pair, fits, D, D, W, C)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([C, ROWS, W], tl.float32)
        for start in range(0, N, BLOCK):
            row = start + tl.arange(0, BLOCK)
            top, total, acc = _forward_block(top, total, acc, pair_u, x, row, x_row, N, scale2, D, W, C)
        _store(pooled, pair, fits, acc / total[None, :, None], D, W, C)
        tl.store(lse + pair, (top + tl.log2(total)) / LOG2E, mask=fits)


@jit
def _backward_block(
    du_sum, pair, fits, pair_u, pair_grad, lse2, delta, x, weight, dscore, row, x_row, N, scale,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, NEED_X: tl.constexpr,
):  # fmt: skip
    """One block of rows: -> the sum of du; keeps p and scale * ds where dx will be computed from them."""
    rows = _load(x, row, row < N, x_row, D, W, C)
    weights = tl.exp2(_scores(rows, pair_u) * (scale * LOG2E) - lse2[None, :])
    weights = tl.where((row < N)[:, None], weights, 0.0)
    dscores = weights * (_scores(rows, pair_grad) - delta[None, :]) * scale
    if NEED_X:
        at = pair[None, :] * N + row[:, None]
        inside = (row < N)[:, None] & fits[None, :]
        tl.store(weight + at, weights.to(weight.dtype.element_ty), mask=inside)
        tl.store(dscore + at, dscores.to(dscore.dtype.element_ty), mask=inside)
    return du_sum + dot(_share(tl.trans(dscores), rows, C), rows)


@jit
def _backward_kernel(
    grad, u, x, pooled, lse, look_of, first, du, weight, dscore, scale, N, H, x_frame, x_row,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr, NEED_X: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: all heads of all looks at one frame -> du, and with NEED_X weight p and dscore [K*H,N]."""
    frame = tl.program_id(0)
    x += frame.to(tl.int64) * x_frame
    begin = (frame if ONE else tl.load(first + frame)) * H
    end = (frame + 1 if ONE else tl.load(first + frame + 1)) * H
    for tile in range(begin, end, ROWS):
        pair, fits = _pairs(tile, end, look_of, H, ONE, ROWS)
        pair_u = _load(u, pair, fits, D, D, W, C)
        pair_grad = _load(grad, pair, fits, D, D, W, C)
        product = pair_grad.to(tl.float32) * _load(pooled, pair, fits, D, D, W, C).to(tl.float32)
        delta = tl.sum(tl.sum(product, 2), 0)
        lse2 = tl.load(lse + pair, mask=fits, other=0.0) * LOG2E
        du_sum = tl.zeros([C, ROWS, W], tl.float32)
        for start in range(0, N, BLOCK):
            row = start + tl.arange(0, BLOCK)
            du_sum = _backward_block(
                du_sum, pair, fits, pair_u, pair_grad, lse2, delta, x, weight, dscore, row, x_row, N, scale,
                D, W, C, NEED_X,
            )  # fmt: skip
        _store(du, pair, fits, du_sum, D, W, C)


@jit
def _rows_kernel(
    grad, u, weight, dscore, look_of, first, dx, N, H,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of one frame and WIDE of their numbers, dx = p^T g + (scale ds)^T u. x is not read."""
    part = tl.program_id(0) % (D // WIDE)
    frame = tl.program_id(0) // (D // WIDE)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = part * WIDE + tl.arange(0, WIDE)[None, :]
    begin = (frame if ONE else tl.load(first + frame)) * H
    end = (frame + 1 if ONE else tl.load(first + frame + 1)) * H
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    for tile in range(begin, end, ROWS):
        pair, fits = _pairs(tile, end, look_of, H, ONE, ROWS)
        at = pair.to(tl.int64)[None, :] * N + row[:, None]
        inside = (row < N)[:, None] & fits[None, :]
        weights = tl.load(weight + at, mask=inside, other=0.0)
        dscores = tl.load(dscore + at, mask=inside, other=0.0)
        at = pair[:, None] * D + column
        total += dot(weights, tl.load(grad + at, mask=fits[:, None], other=0.0))
        total += dot(dscores, tl.load(u + at, mask=fits[:, None], other=0.0))
    at = (frame.to(tl.int64) * N + row[:, None]) * D + column
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(row < N)[:, None])
