"""Attention with ONE query per head and look: the softmax over the N keys of the look's own frame.

    s[k,h,n] = scale * <query[k,h], key[f,n,h]>        f = frame_of_look[k]
    p[k,h,:] = softmax(s[k,h,:])
    out[k,h] = sum_n p[k,h,n] value[f,n,h]

Shapes: F frames, K looks, N patches + CLS, H heads, d head width.
"""

import torch
from torch import Tensor


def reference(query: Tensor, key: Tensor, value: Tensor, frame_of_look: Tensor | None, scale: float) -> Tensor:
    """The maths above in plain PyTorch, with softmax in fp32 (fp64 for fp64 inputs). Shapes as `query_attention`."""
    if frame_of_look is not None:
        key, value = key.index_select(0, frame_of_look), value.index_select(0, frame_of_look)
    scores = torch.einsum("khd,knhd->khn", query, key).to(_accumulator(query.dtype)) * scale
    weights = scores.softmax(-1).to(value.dtype)
    return torch.einsum("khn,knhd->khd", weights, value)


def query_attention(
    query: Tensor, key: Tensor, value: Tensor, frame_of_look: Tensor | None, scale: float
) -> Tensor:
    """Every look attends with one query per head to its frame's keys and values.

    query [K,H,d], key and value [F,N,H,d] (any strides), all of one floating type and one device;
    frame_of_look int [K] with entries in 0..F-1, or None: then K == F and look k sees frame k. -> [K,H,d].
    Several looks may see one frame and a frame may have no look.

    Raises ValueError for shapes, types or devices that do not fit. Entries of frame_of_look are checked on the CPU
    only: on a GPU the check would wait for the device at every layer.
    """
    _check(query, key, value, frame_of_look)
    return reference(query, key, value, frame_of_look, scale)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(query: Tensor, key: Tensor, value: Tensor, frame_of_look: Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 3 or key.ndim != 4 or key.shape != value.shape or query.shape[1:] != key.shape[2:]:
        raise ValueError(f"query_attention: expected query [K,H,d], key and value [F,N,H,d]; got {shapes}")
    if key.shape[1] == 0:
        raise ValueError(f"query_attention: a frame without keys has no softmax; got {shapes}")
    if not query.dtype.is_floating_point or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query_attention: one floating type for all; got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(f"query_attention: one device for all; got {query.device}, {key.device}, {value.device}")
    if frame_of_look is None:
        if query.shape[0] != key.shape[0]:
            raise ValueError(f"query_attention: without frame_of_look K must equal F; got {shapes}")
        return
    if frame_of_look.shape != query.shape[:1] or frame_of_look.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"query_attention: frame_of_look must be int32 or int64 [{query.shape[0]}]; "
            f"got {frame_of_look.dtype} {tuple(frame_of_look.shape)}"
        )
    if frame_of_look.device != query.device:
        raise ValueError(f"query_attention: frame_of_look is on {frame_of_look.device}, query on {query.device}")
    if frame_of_look.device.type == "cpu" and not torch.compiler.is_compiling() and frame_of_look.numel():
        low, high = int(frame_of_look.min()), int(frame_of_look.max())
        if low < 0 or high >= key.shape[0]:
            raise ValueError(f"query_attention: frame_of_look reaches from {low} to {high}, frames are {key.shape[0]}")
