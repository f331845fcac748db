"""Query attention with the projections of keys and values absorbed: it reads the hidden state itself, once.

With the plain form's key = W_k x + b_k and value = W_v x + b_v of the rows x [F,N,D], which the layer norm gave, and
W_k,h, W_v,h the rows [d,D] of head h (all sums over n run over the frame of look k):

    u[k,h]      = W_k,h^T query[k,h]
    s[k,h,n]    = scale * <u[k,h], x[f,n]>          the term of b_k does not depend on n: softmax drops it
    pooled[k,h] = sum_n softmax(s)[k,h,n] x[f,n]
    out[k,h]    = W_v,h pooled[k,h] + b_v,h

Everything but the pooling is small (no N in it) and plain PyTorch; the pooling is the kernel. It is attention with
x as keys and as values of all heads at once, so the heads of a frame's looks fill the rows of a tensor-core tile.
Backward, with g = d loss / d pooled, delta[k,h] = <g[k,h], pooled[k,h]> and ds = p (<g, x> - delta):

    du[k,h] = scale * sum_n ds[k,h,n] x[f,n]        dx[f,n] = sum_k,h p[k,h,n] g[k,h] + scale * ds[k,h,n] u[k,h]

x is read once: that pass gives du and keeps p and ds [K,H,N], H/D of x in size, from which dx follows without x; for a
frozen encoder neither is kept nor dx computed. No atomics: the same bits in every run.

Shapes: F frames, K looks, N patches + CLS, H heads, d head width, D = H*d. Sums are in fp32 (fp64 for fp64 inputs).
Relative RMS error against float64: 1e-5 in fp32, 1e-2 in bf16 for the pooling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.absorbed_kernels import _backward_kernel, _forward_kernel, _rows_kernel
from kernels.common import (
    TRIAL,
    accumulator,
    attend_by_frame,
    check_looks,
    dense_rows,
    group_looks,
    shared_memory_limit,
    triton,
    uses_triton,
)

ROWS = 16  # (look, head) pairs that share one read of a frame: the smallest tile of tl.dot
BLOCK = 32  # rows of a frame at a time
H100 = 232448  # bytes of shared memory that one program may take there


def reference(folded: Tensor, hidden: Tensor, frame_of_look: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The pooling in plain PyTorch: folded u [K,H,D], hidden x [F,N,D] -> (pooled [K,H,D], lse [K,H])."""

    def attend(folded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = folded.flatten(1, 2)  # [f,c*H,D]
        scores = (rows @ hidden.transpose(1, 2)).to(accumulator(rows.dtype)) * scale  # [f,c*H,N]
        pooled = scores.softmax(-1).to(hidden.dtype) @ hidden
        return pooled.view_as(folded), scores.logsumexp(-1).view(folded.shape[:3])

    return attend_by_frame(attend, folded, (hidden,), frame_of_look)


def tile_width(width: int) -> int:
    """WIDE: a row of D numbers is cut into at most 16 tiles of a power of two; 0 where that does not go."""
    wide = min(width & -width, 128)
    return wide if wide >= 16 and width <= 16 * wide else 0


def shared_memory(width: int, stages: int) -> int:
    """Bytes of shared memory that a program of the backward kernel, the larger one, takes in 16-bit types.

    Blocks of rows that are on their way, u and g, and sums across warps. Read off the compiled kernels and checked by
    tests/kernels/test_compile.py.
    """
    return ((stages - 1) * BLOCK + 2 * ROWS) * 2 * width + 2048


def stages(width: int, limit: int) -> int:
    """The stages of loads (2: one block of rows ahead of its use, 3: two), for a device with `limit` bytes a program;
    0 where no kernel fits."""
    fitting = [stages for stages in (3, 2) if shared_memory(width, stages) <= limit]
    return fitting[0] if fitting and tile_width(width) else 0


def fits(hidden: Tensor) -> bool:
    """Whether the type and the width of rows [F,N,D], and the GPU's shared memory, allow the kernel.

    Cards with 99 KiB a program (compute capability 8.6, 8.9, 12.0) hold up to DINOv2-base's 768 numbers.
    """
    return triton is not None and hidden.dtype in (torch.bfloat16, torch.float16) and tiles(hidden)["num_stages"] > 0


def available(hidden: Tensor) -> bool:
    """Whether the kernel runs on rows [F,N,D] like these, with one look at a frame and with several."""
    return all(_uses_triton("auto", hidden, fits(hidden), one) for one in (True, False))


def _uses_triton(implementation: str, hidden: Tensor, fits: bool, one: bool) -> bool:
    width = next((D for D in range(16, 2049, 16) if hidden.shape[-1] == D), 0)  # a constant, for a compiler too
    return uses_triton("absorbed_pooling", implementation, hidden, fits, ((TRIAL, width),), one)


def tiles(hidden: Tensor) -> dict[str, int]:
    """How the kernels cut a frame's rows [F,N,D], and the warps that share a program."""
    width = hidden.shape[-1]
    limit = shared_memory_limit(hidden.device) if torch.cuda.is_available() else H100
    return {
        "D": width, "WIDE": tile_width(width), "BLOCK": BLOCK, "ROWS": ROWS,
        "num_warps": 4 if width <= 512 else 8, "num_stages": stages(width, limit), "enable_fp_fusion": True,
    }  # fmt: skip


@torch.library.custom_op("fovlm_kernels::absorbed_pooling", mutates_args=())
def _forward(
    folded: Tensor, hidden: Tensor, look_of: Tensor | None, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward kernel -> (pooled [K,H,D], lse [K,H] fp32). look_of, first: as group_looks gives them."""
    (looks, heads, _), (frames, rows) = folded.shape, hidden.shape[:2]
    folded, hidden = folded.contiguous(), dense_rows(hidden)
    pooled = torch.empty_like(folded)
    lse = torch.empty((looks, heads), dtype=torch.float32, device=folded.device)
    if first is not None:  # a look at a frame that does not exist belongs to no program
        pooled.fill_(float("nan"))
        lse.fill_(float("nan"))
    if frames and looks:
        _forward_kernel[(frames,)](
            folded, hidden, look_of, first, pooled, lse, scale * 1.4426950408889634, rows, heads,
            *hidden.stride()[:2], ONE=first is None, **tiles(hidden),
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
    grad, folded, hidden, one = grad.contiguous(), folded.contiguous(), dense_rows(hidden), first is None
    dfolded = torch.empty_like(folded) if one else torch.full_like(folded, float("nan"))
    dhidden = torch.empty(hidden.shape if need_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    kept = -(-rows // 16) * 16  # whole aligned blocks
    shape = (2, looks * heads, kept) if need_hidden else (2, 0)
    weight, dscore = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
    if frames and looks:
        _backward_kernel[(frames,)](
            grad, folded, hidden, pooled, lse, look_of, first, dfolded, weight, dscore, scale, rows, heads,
            *hidden.stride()[:2], kept, ONE=one, NEED_X=need_hidden, **tiles(hidden),
        )  # fmt: skip
    if frames and need_hidden:
        wide, block = tile_width(width), 32 if hidden.dtype == torch.float32 else 64
        _rows_kernel[(frames * (width // wide), -(-rows // block))](
            grad, folded, weight, dscore, look_of, first, dhidden, rows, heads, kept,
            D=width, WIDE=wide, BLOCK=block, ONE=one, ROWS=ROWS, num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return dfolded, dhidden


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
) -> Tensor:
    """Every look pools its frame's rows, once per head -> [K,H,D].

    folded [K,H,D] and hidden [F,N,D] (any strides; no copy while the last is 1) of one floating type and device;
    frame_of_look and implementation as in `query_attention`, but "auto" keeps fp32 to the reference. Raises ValueError
    for what does not fit.
    """
    shapes = f"folded {list(folded.shape)}, hidden {list(hidden.shape)}"
    if folded.ndim != 3 or hidden.ndim != 3 or folded.shape[2] != hidden.shape[2]:
        raise ValueError(f"absorbed_attention: expected folded [K,H,D], hidden [F,N,D]; got {shapes}")
    if 0 in hidden.shape[1:] or folded.shape[1] == 0:
        raise ValueError(f"absorbed_attention: N, H and D must be 1 or more; got {shapes}")
    check_looks("absorbed_attention", folded, hidden, frame_of_look)
    # in fp32 the tiles don't fit a thread's registers: correct, for tests, but no faster than two matrix products
    runs = fits(hidden) or (implementation == "triton" and tile_width(hidden.shape[2]) > 0)
    if not _uses_triton(implementation, hidden, runs, frame_of_look is None):
        return reference(folded, hidden, frame_of_look, scale)[0]
    look_of, first = (None, None) if frame_of_look is None else group_looks(frame_of_look, hidden.shape[0])
    return _forward(folded, hidden, look_of, first, scale)[0]


def absorbed_attention(
    query: Tensor,
    hidden: Tensor,
    frame_of_look: Tensor | None,
    scale: float,
    *,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    implementation: str = "auto",
) -> Tensor:
    """What `query_attention` gives for the keys and values of rows, from the rows -> [K,H,d].

    query [K,H,d]; hidden x [F,N,D]; key_weight, value_weight [H*d,D] and key_bias, value_bias [H*d] or None, as in
    nn.Linear. key_bias gets the gradient zero. frame_of_look and implementation as in `absorbed_pooling`.

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
    folded = (query.transpose(0, 1) @ key_weight.unflatten(0, (heads, width))).transpose(0, 1)
    pooled = absorbed_pooling(folded, hidden, frame_of_look, scale, implementation=implementation)
    out = (pooled.transpose(0, 1) @ value_weight.unflatten(0, (heads, width)).mT).transpose(0, 1)
    if value_bias is not None:
        out = out + value_bias.unflatten(0, (heads, width))
    if key_bias is not None:  # softmax drops it; this keeps the parameter in the graph, with the zero it deserves
        out = out + 0.0 * key_bias.unflatten(0, (heads, width))
    return out
