"""The Triton kernels of `absorbed_attention.py`, which has the formulas.

A program walks the rows of one frame in blocks, and reads each once. The width D is cut into tiles of WIDE numbers, a
tuple of them for a block of rows or pairs; each tile of rows is the right operand of two products, one over WIDE (the
scores) and one over the rows (the sums). The first row starts the sums, so that 257 rows are it and whole blocks.
"""

from __future__ import annotations

from kernels.common import LOG2E, dot, jit, tl


@jit
def _read(base, place, fits, stride, D: tl.constexpr, WIDE: tl.constexpr):
    """Rows `place` [R] of D numbers as tiles [R,WIDE]; zeros, which cost no reading, where a row does not fit."""
    at = base + place[:, None] * stride + tl.arange(0, WIDE)[None, :]
    tiles: tl.tuple = ()
    for part in tl.static_range(D // WIDE):
        tiles += (tl.load(at + part * WIDE, mask=fits[:, None], other=0.0),)
    return tiles


@jit
def _write(base, place, fits, tiles, D: tl.constexpr, WIDE: tl.constexpr):
    """The opposite of `_read`, to dense rows."""
    at = base + place[:, None] * D + tl.arange(0, WIDE)[None, :]
    for part in tl.static_range(D // WIDE):
        tl.store(at + part * WIDE, tiles[part].to(base.dtype.element_ty), mask=fits[:, None])


@jit
def _scores(pairs, rows, D: tl.constexpr, WIDE: tl.constexpr):
    """Tiles of pairs [R] and of rows [B] -> their products [R,B]."""
    total = dot(pairs[0], tl.trans(rows[0]))
    for part in tl.static_range(1, D // WIDE):
        total += dot(pairs[part], tl.trans(rows[part]))
    return total


@jit
def _first_scores(pairs, x, D: tl.constexpr, WIDE: tl.constexpr):
    """Tiles of pairs [R] and the frame's first row -> their products [R]."""
    total = tl.sum(pairs[0].to(tl.float32) * _first_row(x, 0, WIDE), 1)
    for part in tl.static_range(1, D // WIDE):
        total += tl.sum(pairs[part].to(tl.float32) * _first_row(x, part, WIDE), 1)
    return total


@jit
def _first_row(x, part, WIDE: tl.constexpr):
    return tl.load(x + part * WIDE + tl.arange(0, WIDE)).to(tl.float32)[None, :]


@jit
def _begin(weights, x, D: tl.constexpr, WIDE: tl.constexpr):
    """Weights [R] times the frame's first row: the sums so far, as tiles [R,WIDE]."""
    sums: tl.tuple = ()
    for part in tl.static_range(D // WIDE):
        sums += (weights[:, None] * _first_row(x, part, WIDE),)
    return sums


@jit
def _scaled(sums, by, D: tl.constexpr, WIDE: tl.constexpr):
    """The sums of each pair times its number in `by` [R]."""
    new: tl.tuple = ()
    for part in tl.static_range(D // WIDE):
        new += (sums[part] * by[:, None],)
    return new


@jit
def _add(sums, weights, rows, D: tl.constexpr, WIDE: tl.constexpr):
    """The sums and weights [R,B] times the rows [B]."""
    new: tl.tuple = ()
    weights = weights.to(rows[0].dtype)
    for part in tl.static_range(D // WIDE):
        new += (sums[part] + dot(weights, rows[part]),)
    return new


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
def _pairs_of(frame, first, H, ONE: tl.constexpr):
    """The frame's (look, head) pairs, from .. to."""
    if ONE:
        return frame * H, frame * H + H
    else:
        return tl.load(first + frame) * H, tl.load(first + frame + 1) * H


@jit
def _forward_kernel(
    u, x, look_of, first, pooled, lse, scale2, N, H, x_frame, x_row,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: all heads of all looks at one frame, by the online softmax in base 2. scale2 = scale * log2(e)."""
    frame = tl.program_id(0)
    x += frame.to(tl.int64) * x_frame
    begin, end = _pairs_of(frame, first, H, ONE)
    for tile in range(begin, end, ROWS):
        pair, fits = _pairs(tile, end, look_of, H, ONE, ROWS)
        pair_u = _read(u, pair, fits, D, D, WIDE)
        top = _first_scores(pair_u, x, D, WIDE) * scale2
        sums = _begin(tl.full([ROWS], 1.0, tl.float32), x, D, WIDE)
        total = tl.zeros([ROWS, BLOCK], tl.float32) + tl.where(tl.arange(0, BLOCK) == 0, 1.0, 0.0)[None, :]
        for start in range(1, N, BLOCK):
            row = start + tl.arange(0, BLOCK)
            rows = _read(x, row, row < N, x_row, D, WIDE)
            scores = tl.where((row < N)[None, :], _scores(pair_u, rows, D, WIDE) * scale2, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2(top - new_top)
            weights = tl.exp2(scores - new_top[:, None])
            total = total * shrink[:, None] + weights
            sums = _add(_scaled(sums, shrink, D, WIDE), weights, rows, D, WIDE)
            top = new_top
        whole = tl.sum(total, 1)
        _write(pooled, pair, fits, _scaled(sums, 1.0 / whole, D, WIDE), D, WIDE)
        tl.store(lse + pair, (top + tl.log2(whole)) / LOG2E, mask=fits)


@jit
def _backward_kernel(
    grad, u, x, pooled, lse, look_of, first, du, weight, dscore, scale, N, H, x_frame, x_row, kept,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, NEED_X: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: all heads of all looks at one frame -> du, and with NEED_X weight p and dscore [K*H,kept].

    Row n is number n - 1 of those that are kept, and the first row is behind them, so that blocks are aligned.
    """
    frame = tl.program_id(0)
    x += frame.to(tl.int64) * x_frame
    begin, end = _pairs_of(frame, first, H, ONE)
    for tile in range(begin, end, ROWS):
        pair, fits = _pairs(tile, end, look_of, H, ONE, ROWS)
        pair_u = _read(u, pair, fits, D, D, WIDE)
        pair_grad = _read(grad, pair, fits, D, D, WIDE)
        pair_pooled = _read(pooled, pair, fits, D, D, WIDE)
        delta = tl.zeros([ROWS], tl.float32)
        for part in tl.static_range(D // WIDE):
            delta += tl.sum(pair_grad[part].to(tl.float32) * pair_pooled[part].to(tl.float32), 1)
        lse2 = tl.load(lse + pair, mask=fits, other=0.0) * LOG2E
        weight_0 = tl.exp2(_first_scores(pair_u, x, D, WIDE) * (scale * LOG2E) - lse2)
        dscore_0 = weight_0 * (_first_scores(pair_grad, x, D, WIDE) - delta) * scale
        at = pair.to(tl.int64) * kept
        if NEED_X:
            tl.store(weight + at + N - 1, weight_0.to(weight.dtype.element_ty), mask=fits)
            tl.store(dscore + at + N - 1, dscore_0.to(dscore.dtype.element_ty), mask=fits)
        sums = _begin(dscore_0, x, D, WIDE)
        for start in range(1, N, BLOCK):
            row = start + tl.arange(0, BLOCK)
            rows = _read(x, row, row < N, x_row, D, WIDE)
            weights = tl.exp2(_scores(pair_u, rows, D, WIDE) * (scale * LOG2E) - lse2[:, None])
            weights = tl.where((row < N)[None, :], weights, 0.0)
            dscores = weights * (_scores(pair_grad, rows, D, WIDE) - delta[:, None]) * scale
            if NEED_X:
                place = at[:, None] + (row - 1)[None, :]
                inside = fits[:, None] & (row < N)[None, :]
                tl.store(weight + place, weights.to(weight.dtype.element_ty), mask=inside)
                tl.store(dscore + place, dscores.to(dscore.dtype.element_ty), mask=inside)
            sums = _add(sums, dscores, rows, D, WIDE)
        _write(du, pair, fits, sums, D, WIDE)


@jit
def _rows_kernel(
    grad, u, weight, dscore, look_of, first, dx, N, H, kept,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of one frame and WIDE of their numbers, dx = p^T g + (scale ds)^T u. x is not read."""
    part = tl.program_id(0) % (D // WIDE)
    frame = tl.program_id(0) // (D // WIDE)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = part * WIDE + tl.arange(0, WIDE)[None, :]
    begin, end = _pairs_of(frame, first, H, ONE)
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    for tile in range(begin, end, ROWS):
        pair, fits = _pairs(tile, end, look_of, H, ONE, ROWS)
        at = pair.to(tl.int64)[None, :] * kept + place[:, None]
        inside = (place < N)[:, None] & fits[None, :]
        weights = tl.load(weight + at, mask=inside, other=0.0)
        dscores = tl.load(dscore + at, mask=inside, other=0.0)
        at = pair[:, None] * D + column
        total += dot(weights, tl.load(grad + at, mask=fits[:, None], other=0.0))
        total += dot(dscores, tl.load(u + at, mask=fits[:, None], other=0.0))
    row = tl.where(place == N - 1, 0, place + 1)
    at = (frame.to(tl.int64) * N + row[:, None]) * D + column
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(place < N)[:, None])
