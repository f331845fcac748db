"""Attention over a pack, sample by sample: causal within each sample, and no mask of positions by positions.

On CUDA one call of `torch.nn.attention.varlen` takes all samples. Elsewhere, and where that call cannot run, each
sample is one call of `scaled_dot_product_attention`. `varlen_runs` decides once per device and type.

Letters: M positions of the pack, H query heads, G key heads, d head width.
"""

import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fovlm.data.packing import Layout
from kernels.common import FAILURES, reason_of

OPTIONS = inspect.signature(varlen_attn).parameters  # they differ between torch 2.11 and 2.13
LONGEST = 128  # the longest sample is rounded up to a multiple, so that a compiled graph sees few values of it
log = logging.getLogger("fovlm")


@dataclass
class Segments:
    """How a packed sequence divides into samples. `varlen`: one call takes all of them."""

    lengths: list[int]  # of all segments, padding included; known on the host
    cu_seqlens: Tensor  # i32 [n + 1]: where each segment starts, then M
    longest: int
    varlen: bool


def segments(layout: Layout, x: Tensor) -> Segments:
    """The segments of a layout, for attention over activations like x."""
    longest = -(-max(layout.lengths) // LONGEST) * LONGEST
    return Segments(layout.lengths, layout.cu_seqlens, longest, varlen_runs(x.device, x.dtype))


def attend_by_sample(query: Tensor, key: Tensor, value: Tensor, pack: Segments, scale: float | None) -> Tensor:
    """Queries [1, H, M, d] over keys and values [1, G, M, d], each sample causally over itself -> [1, M, H, d]."""
    if pack.varlen:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [M, heads, d]
        return _varlen(q, k, v, pack.cu_seqlens, pack.longest, scale)[None]
    return _one_by_one(query, key, value, pack.lengths, scale)


@functools.cache
def varlen_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen_attn` computes and differentiates on this device. Logs one warning on a GPU where it does not."""
    if device.type != "cuda":
        return False
    try:
        x = torch.ones(8, 2, 64, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            _varlen(x, x, x, torch.tensor([0, 3, 8], dtype=torch.int32, device=device), LONGEST, None).sum().backward()
        return bool(x.grad is not None and x.grad.isfinite().all())
    except FAILURES as error:
        log.warning(
            "attention runs sample by sample: varlen_attn cannot run in %s on %s: %s", dtype, device, reason_of(error)
        )
        return False


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    """One call for all samples: [M, H, d] over [M, G, d] -> [M, H, d]."""
    options: dict[str, Any] = {"scale": scale}
    options |= {"window_size": (-1, 0)} if "window_size" in OPTIONS else {"is_causal": True}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in OPTIONS:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    seen = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    assert isinstance(seen, Tensor)  # nothing else was asked for
    return seen


@torch.compiler.disable  # the lengths change with every pack
def _one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """One call for each sample, over keys and values repeated for the heads that share them."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    samples = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    seen = [nnf.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in samples]
    return torch.cat(seen, dim=2).transpose(1, 2)
