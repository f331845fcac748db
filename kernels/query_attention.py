"""Attention with ONE query per head and look: the softmax over the N keys of the look's own frame.

    s[k,h,n] = scale * <query[k,h], key[f,n,h]>                       f = frame_of_look[k]
    p[k,h,:] = softmax(s[k,h,:])        lse[k,h] = log sum_n exp s[k,h,n]
    out[k,h] = sum_n p[k,h,n] value[f,n,h]

Backward, with g = d loss / d out and delta[k,h] = <g[k,h], out[k,h]>; sums over k run over the looks of frame f:

    ds[k,h,n]     = p[k,h,n] (<g[k,h], value[f,n,h]> - delta[k,h])    p = exp(s - lse), computed again
    dquery[k,h]   = scale * sum_n ds[k,h,n] key[f,n,h]
    dkey[f,n,h]   = scale * sum_k ds[k,h,n] query[k,h]
    dvalue[f,n,h] = sum_k p[k,h,n] g[k,h]

A general kernel pads the one query to a tile of 64 or 128 rows. Here one program owns a frame and a head, reads its
keys and values once in each direction and writes dkey and dvalue itself: no atomics, the same bits in every run. With
one look per frame (frame_of_look None) the products are plain vector sums, since reading the bytes takes longer than
the arithmetic; several looks at a frame go through the tensor cores, sixteen at a time.

Shapes: F frames, K looks, N patches + CLS, H heads, d head width. Sums are in fp32 (fp64 for fp64 inputs).
Relative RMS error against float64: 1e-5 in fp32, 1e-2 in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.common import TRIAL, accumulator, attend_by_frame, check_looks, dense_rows, group_looks, uses_triton
from kernels.query_kernels import _backward_kernel, _forward_kernel

WIDTHS = (16, 32, 64, 128, 256)  # head widths d with a Triton kernel
LOOKS = 16  # looks at one frame that share one read of its keys and values: the smallest tile of tl.dot


def reference(
    query: Tensor, key: Tensor, value: Tensor, frame_of_look: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The maths above in plain PyTorch -> (out [K,H,d], lse [K,H]).

    The query is spread over a block diagonal [H, H*d], so that one matrix product over the frame's rows [N, H*d]
    serves all heads, and all looks at the frame, without a copy of key or value.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        looks, heads = query.shape[1:3]
        diagonal = torch.diag_embed(query.transpose(2, 3), dim1=2, dim2=3).flatten(3)  # [f,c,H,H*d]
        scores = diagonal.flatten(1, 2) @ key.flatten(2).transpose(1, 2)  # [f,c*H,N]
        scores = scores.to(accumulator(query.dtype)) * scale
        pooled = scores.softmax(-1).to(value.dtype) @ value.flatten(2)  # [f,c*H,H*d]
        pooled = pooled.unflatten(2, (heads, -1)).unflatten(1, (looks, heads)).diagonal(dim1=2, dim2=3)
        return pooled.transpose(2, 3).contiguous(), scores.logsumexp(-1).unflatten(1, (looks, heads))

    return attend_by_frame(attend, query, (key, value), frame_of_look)


def tiles(rows: int, width: int, one: bool) -> dict[str, int]:
    """Blocks of rows for a frame of `rows` keys of this width: full blocks, and a smaller one for what is left.

    257 = 8 * 32 + 1 costs one more row, not one more block. A block of one look is sized so that one warp holds its
    keys and values (16-byte loads, no exchange between warps); a tile of looks feeds tl.dot, which wants 16 rows.
    """
    block = max(2048 // width, 16) if one else (64 if width <= 128 else 32)
    rest = rows % block
    tail = 0 if rest == 0 else max(1 << (rest - 1).bit_length(), 1 if one else 16)
    warps, stages = (1, 1) if one else (4, 2)
    return {"BLOCK": block, "TAIL": tail, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@torch.library.custom_op("fovlm_kernels::query_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, look_of: Tensor | None, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward kernel -> (out [K,H,d], lse [K,H] fp32). look_of, first: as group_looks gives them."""
    (looks, heads, width), (frames, rows) = query.shape, key.shape[:2]
    query, key, value = query.contiguous(), dense_rows(key), dense_rows(value)
    out = torch.empty_like(query)
    lse = torch.empty((looks, heads), dtype=torch.float32, device=query.device)
    if first is not None:  # a look at a frame that does not exist belongs to no program
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
    if frames and looks:
        _forward_kernel[(frames * heads,)](
            query, key, value, look_of, first, out, lse, scale * 1.4426950408889634, rows, heads,
            *key.stride()[:3], *value.stride()[:3],
            d=width, ONE=first is None, LOOKS=LOOKS, **tiles(rows, width, first is None),
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(query, key, value, look_of, first, scale):
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fovlm_kernels::query_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    look_of: Tensor | None, first: Tensor | None, scale: float, need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward kernel -> (dquery, dkey, dvalue); the latter two are empty [0] unless need_kv."""
    (looks, heads, width), (frames, rows) = query.shape, key.shape[:2]
    grad, query, key, value = grad.contiguous(), query.contiguous(), dense_rows(key), dense_rows(value)
    if first is None:
        dquery = torch.empty_like(query)
    else:
        dquery = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    dkey, dvalue = (torch.empty(key.shape if need_kv else 0, dtype=key.dtype, device=key.device) for _ in range(2))
    launch = tiles(rows, width, first is None)
    if first is not None:
        launch["num_warps"] = 8  # with 4, ptxas spills 8 to 16 bytes of registers on sm_80, sm_90 and sm_120
    if frames and (need_kv or looks):
        _backward_kernel[(frames * heads,)](
            grad, query, key, value, out, lse, look_of, first, dquery, dkey, dvalue, scale, rows, heads,
            *key.stride()[:3], *value.stride()[:3],
            d=width, ONE=first is None, LOOKS=LOOKS, NEED_KV=need_kv, **launch,
        )  # fmt: skip
    return dquery.to(query.dtype), dkey, dvalue


@_backward.register_fake
def _(grad, query, key, value, out, lse, look_of, first, scale, need_kv):
    dkey, dvalue = (key.new_empty(key.shape if need_kv else 0) for _ in range(2))
    return torch.empty_like(query, memory_format=torch.contiguous_format), dkey, dvalue


def _save(ctx, inputs, output):
    query, key, value, look_of, first, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, look_of, first)


def _autograd(ctx, grad, _grad_lse):
    need_kv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    query, key, value, out, lse, look_of, first = ctx.saved_tensors
    dquery, dkey, dvalue = _backward(grad, query, key, value, out, lse, look_of, first, ctx.scale, need_kv)
    return dquery, dkey if need_kv else None, dvalue if need_kv else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save)


def query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_of_look: Tensor | None,
    scale: float,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Every look attends with one query per head to its frame's keys and values -> [K,H,d].

    query [K,H,d]; key and value [F,N,H,d] with any strides (no copy is made while the last one is 1); all of one
    floating type on one device. frame_of_look int [K] with entries in 0..F-1, or None: then K == F and look k sees
    frame k. Several looks may see one frame and a frame may have none.
    implementation: "auto" (Triton on CUDA, the reference elsewhere), "triton" or "reference".

    Raises ValueError for shapes, types, devices or an implementation that do not fit. Entries of frame_of_look out
    of range raise it on the CPU and give NaN on a GPU, where a check would wait for the device.
    """
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.ndim != 3 or key.ndim != 4 or key.shape != value.shape or query.shape[1:] != key.shape[2:]:
        raise ValueError(f"query_attention: expected query [K,H,d], key and value [F,N,H,d]; got {shapes}")
    if 0 in key.shape[1:]:
        raise ValueError(f"query_attention: N, H and d must be 1 or more; got {shapes}")
    check_looks("query_attention", query, key, frame_of_look)
    check_looks("query_attention", query, value, frame_of_look)
    width = next((d for d in WIDTHS if d == query.shape[2]), 0)  # a constant, for a compiler too
    frames = ((TRIAL, 2, width),) * 2
    if not uses_triton("query_attention", implementation, query, width > 0, frames, frame_of_look is None):
        return reference(query, key, value, frame_of_look, scale)[0]
    look_of, first = (None, None) if frame_of_look is None else group_looks(frame_of_look, key.shape[0])
    return _forward(query, key, value, look_of, first, scale)[0]
