"""The Triton kernels of `query_attention.py`, which has the formulas."""

from __future__ import annotations

from kernels.common import LOG2E, dot, jit, load_rows, tl


@jit
def _scores(query, key, ONE: tl.constexpr):
    """[d], [B,d] -> [B] for one look; [L,d], [B,d] -> [L,B] for a tile of looks."""
    if ONE:
        return tl.sum(query.to(tl.float32)[None, :] * key.to(tl.float32), 1)
    else:
        return dot(query, tl.trans(key))


@jit
def _pool(weights, value, ONE: tl.constexpr):
    """[B], [B,d] -> [d]; [L,B], [B,d] -> [L,d]."""
    if ONE:
        return tl.sum(weights[:, None] * value.to(tl.float32), 0)
    else:
        return dot(weights.to(value.dtype), value)


@jit
def _spread(weights, rows, ONE: tl.constexpr):
    """[B], [d] -> [B,d]; [L,B], [L,d] -> [B,d], summed over looks."""
    if ONE:
        return weights[:, None] * rows.to(tl.float32)[None, :]
    else:
        return dot(tl.trans(weights).to(rows.dtype), rows)


@jit
def _column(number, ONE: tl.constexpr):
    """A number per look, shaped to meet one more dimension."""
    if ONE:
        return number
    else:
        return number[:, None]


@jit
def _forward_block(
    top, total, acc, query, key, value, row, key_row, value_row, N, scale2,
    d: tl.constexpr, MASKED: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One block of rows in the online softmax (base 2): `top` the largest score so far; `total` and `acc` its sums."""
    keys = load_rows(key, row, key_row, N, d, MASKED)
    values = load_rows(value, row, value_row, N, d, MASKED)
    scores = _scores(query, keys, ONE) * scale2
    if MASKED:
        scores = tl.where(row < N if ONE else (row < N)[None, :], scores, float("-inf"))
    axis: tl.constexpr = 0 if ONE else 1
    new_top = tl.maximum(top, tl.max(scores, axis))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores - _column(new_top, ONE))
    acc = acc * _column(shrink, ONE) + _pool(weights, values, ONE)
    return new_top, total * shrink + tl.sum(weights, axis), acc


@jit
def _forward_kernel(
    query, key, value, look_of, first, out, lse, scale2, N, H,
    key_frame, key_row, key_head, value_frame, value_row, value_head,
    d: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ONE: tl.constexpr, LOOKS: tl.constexpr,
):  # fmt: skip
    """One program: all looks at one frame, one head. scale2 = scale * log2(e): the softmax is taken in base 2."""
    frame = tl.program_id(0) // H
    head = tl.program_id(0) % H
    key += frame.to(tl.int64) * key_frame + head * key_head
    value += frame.to(tl.int64) * value_frame + head * value_head
    column = tl.arange(0, d)
    begin = frame if ONE else tl.load(first + frame)
    end = frame + 1 if ONE else tl.load(first + frame + 1)
    for tile in range(begin, end, LOOKS):
        if ONE:
            number = tile * H + head  # of this look and head in [K,H]
            at = number * d + column
            top = float("-inf")
            total = 0.0
            acc = tl.zeros([d], tl.float32)
            asked = tl.load(query + at)
        else:
            place = tile + tl.arange(0, LOOKS)
            fits = place < end
            number = tl.load(look_of + place, mask=fits, other=0) * H + head
            at = number[:, None] * d + column[None, :]
            top = tl.full([LOOKS], float("-inf"), tl.float32)
            total = tl.zeros([LOOKS], tl.float32)
            acc = tl.zeros([LOOKS, d], tl.float32)
            asked = tl.load(query + at, mask=fits[:, None], other=0.0)
        for start in range(0, N - N % BLOCK, BLOCK):
            row = start + tl.arange(0, BLOCK)
            top, total, acc = _forward_block(
                top, total, acc, asked, key, value, row, key_row, value_row, N, scale2, d, False, ONE
            )
        if TAIL > 0:
            row = N - N % BLOCK + tl.arange(0, TAIL)
            top, total, acc = _forward_block(
                top, total, acc, asked, key, value, row, key_row, value_row, N, scale2, d, True, ONE
            )
        result = (acc / _column(total, ONE)).to(out.dtype.element_ty)
        tl.store(out + at, result, mask=None if ONE else fits[:, None])
        tl.store(lse + number, (top + tl.log2(total)) / LOG2E, mask=None if ONE else fits)


@jit
def _backward_block(
    dquery_sum, asked, slope, lse2, delta, grad, query, key, value, out, lse, look_of, dquery, dkey, dvalue,
    begin, end, head, row, key_row, value_row, N, H, scale,
    d: tl.constexpr, MASKED: tl.constexpr, ONE: tl.constexpr, LOOKS: tl.constexpr, NEED_KV: tl.constexpr,
):  # fmt: skip
    """One block of rows: writes its dkey and dvalue; -> the sum of dquery (one look), or adds to dquery in memory."""
    keys = load_rows(key, row, key_row, N, d, MASKED)
    values = load_rows(value, row, value_row, N, d, MASKED)
    column = tl.arange(0, d)
    if ONE:
        weights = tl.exp2(_scores(asked, keys, ONE) * (scale * LOG2E) - lse2)
        if MASKED:
            weights = tl.where(row < N, weights, 0.0)
        dscores = weights * (_scores(slope, values, ONE) - delta) * scale
        dquery_sum += _pool(dscores, keys, ONE)
        dkeys = _spread(dscores, asked, ONE)
        dvalues = _spread(weights, slope, ONE)
    else:
        dkeys = tl.zeros(keys.shape, tl.float32)
        dvalues = tl.zeros(keys.shape, tl.float32)
        for tile in range(begin, end, LOOKS):
            place = tile + tl.arange(0, LOOKS)
            fits = place < end
            number = tl.load(look_of + place, mask=fits, other=0) * H + head
            at = number[:, None] * d + column[None, :]
            query_tile = tl.load(query + at, mask=fits[:, None], other=0.0)
            grad_tile = tl.load(grad + at, mask=fits[:, None], other=0.0)
            out_tile = tl.load(out + at, mask=fits[:, None], other=0.0)
            tile_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
            tile_lse2 = tl.load(lse + number, mask=fits, other=0.0) * LOG2E
            weights = tl.exp2(_scores(query_tile, keys, ONE) * (scale * LOG2E) - tile_lse2[:, None])
            if MASKED:
                weights = tl.where((row < N)[None, :], weights, 0.0)
            dscores = weights * (_scores(grad_tile, values, ONE) - tile_delta[:, None]) * scale
            dkeys += _spread(dscores, query_tile, ONE)
            dvalues += _spread(weights, grad_tile, ONE)
            # only this program adds to this look and head; the barrier shows the sum to the threads of the next block
            so_far = tl.load(dquery + at, mask=fits[:, None], other=0.0)
            tl.store(dquery + at, so_far + _pool(dscores, keys, ONE), mask=fits[:, None])
            tl.debug_barrier()
    if NEED_KV:
        at = row.to(tl.int64)[:, None] * (H * d) + column[None, :]
        mask = (row < N)[:, None] if MASKED else None
        tl.store(dkey + at, dkeys.to(dkey.dtype.element_ty), mask=mask)
        tl.store(dvalue + at, dvalues.to(dvalue.dtype.element_ty), mask=mask)
    return dquery_sum


@jit
def _backward_kernel(
    grad, query, key, value, out, lse, look_of, first, dquery, dkey, dvalue, scale, N, H,
    key_frame, key_row, key_head, value_frame, value_row, value_head,
    d: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ONE: tl.constexpr, LOOKS: tl.constexpr,
    NEED_KV: tl.constexpr,
):  # fmt: skip
    """One program: one frame, one head; one pass over its keys and values. dkey and dvalue are dense [F,N,H,d]."""
    frame = tl.program_id(0) // H
    head = tl.program_id(0) % H
    key += frame.to(tl.int64) * key_frame + head * key_head
    value += frame.to(tl.int64) * value_frame + head * value_head
    dkey += (frame.to(tl.int64) * N * H + head) * d
    dvalue += (frame.to(tl.int64) * N * H + head) * d
    at = (frame * H + head) * d + tl.arange(0, d)
    if ONE:
        begin = 0
        end = 0
        asked = tl.load(query + at)
        slope = tl.load(grad + at)
        delta = tl.sum(slope.to(tl.float32) * tl.load(out + at).to(tl.float32), 0)
        lse2 = tl.load(lse + frame * H + head) * LOG2E
    else:
        begin = tl.load(first + frame)
        end = tl.load(first + frame + 1)
        asked, slope, delta, lse2 = None, None, None, None
    dquery_sum = tl.zeros([d], tl.float32)
    for start in range(0, N - N % BLOCK, BLOCK):
        row = start + tl.arange(0, BLOCK)
        dquery_sum = _backward_block(
            dquery_sum, asked, slope, lse2, delta, grad, query, key, value, out, lse, look_of, dquery, dkey, dvalue,
            begin, end, head, row, key_row, value_row, N, H, scale, d, False, ONE, LOOKS, NEED_KV,
        )  # fmt: skip
    if TAIL > 0:
        row = N - N % BLOCK + tl.arange(0, TAIL)
        dquery_sum = _backward_block(
            dquery_sum, asked, slope, lse2, delta, grad, query, key, value, out, lse, look_of, dquery, dkey, dvalue,
            begin, end, head, row, key_row, value_row, N, H, scale, d, True, ONE, LOOKS, NEED_KV,
        )  # fmt: skip
    if ONE:
        tl.store(dquery + at, dquery_sum.to(dquery.dtype.element_ty))
