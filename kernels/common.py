"""What the attention operations share: Triton if there is one, checks of inputs, looks grouped by frame."""

from __future__ import annotations

import functools
import itertools
import logging
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    ON_CPU = bool(triton.knobs.runtime.interpret)  # kernels are interpreted: chosen before Triton is imported
    INTERPRETED = tl.constexpr(ON_CPU)
    LOG2E = tl.constexpr(1.4426950408889634)
    OWN_ERRORS: tuple[type[Exception], ...] = (triton.TritonError,)
except ImportError:  # Triton exists for Linux only; elsewhere the references serve
    triton = tl = LOG2E = INTERPRETED = None
    ON_CPU, OWN_ERRORS = False, ()

    def jit(function):
        return function


IMPLEMENTATIONS = ("auto", "triton", "reference")
# What a compiler, its tools or the launch of a kernel raise. Those of Inductor, Dynamo and CUDA are RuntimeErrors.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, ImportError, OSError, TypeError, AttributeError)
FAILURES += (subprocess.SubprocessError, *OWN_ERRORS)
TRIAL = 255  # rows of a frame on which kernels are tried: whole blocks and the widest rest, whatever their size
Shapes = tuple[tuple[int, ...], ...]
log = logging.getLogger("fovlm")


@functools.cache
@torch.compiler.assume_constant_result
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on this GPU: the number that Triton checks a launch against."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over inputs of this type are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_looks(op: str, looks: Tensor, frames: Tensor, frame_of_look: Tensor | None) -> None:
    """Refuse what does not fit: looks [K,...] and frames [F,...] of one type and device, frame_of_look [K] or None.

    Raises ValueError. The entries of frame_of_look are checked on the CPU only: on a GPU that would wait for the
    device at every layer; there a look at a frame that does not exist comes out as NaN.
    """
    if not looks.dtype.is_floating_point or looks.dtype != frames.dtype:
        raise ValueError(f"{op}: expected one floating type for all inputs, got {looks.dtype} and {frames.dtype}")
    if looks.device != frames.device:
        raise ValueError(f"{op}: expected one device for all inputs, got {looks.device} and {frames.device}")
    if frame_of_look is None:
        if looks.shape[0] != frames.shape[0]:
            raise ValueError(f"{op}: {looks.shape[0]} looks at {frames.shape[0]} frames need frame_of_look")
        return
    if frame_of_look.shape != looks.shape[:1] or frame_of_look.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: expected frame_of_look int32 or int64 [{looks.shape[0]}], "
            f"got {frame_of_look.dtype} {list(frame_of_look.shape)}"
        )
    if frame_of_look.device != looks.device:
        raise ValueError(f"{op}: frame_of_look is on {frame_of_look.device}, the query on {looks.device}")
    if frame_of_look.device.type == "cpu" and frame_of_look.numel() and not torch.compiler.is_compiling():
        low, high = int(frame_of_look.min()), int(frame_of_look.max())
        if low < 0 or high >= frames.shape[0]:
            raise ValueError(f"{op}: frame_of_look reaches from {low} to {high}, there are {frames.shape[0]} frames")


def group_looks(frame_of_look: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Looks sorted by frame, in a fixed order -> (look [K], first [F+1]), both int32.

    The looks of frame f are look[first[f] : first[f+1]]. Nothing waits for the device.
    """
    ordered, look = frame_of_look.sort(stable=True)
    edges = torch.arange(frames + 1, device=frame_of_look.device, dtype=frame_of_look.dtype)
    return look.int(), torch.searchsorted(ordered, edges, out_int32=True)


def attend_by_frame(
    attend: Callable[..., tuple[Tensor, Tensor]],
    looks: Tensor,
    frames: tuple[Tensor, ...],
    frame_of_look: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A reference's `attend` for looks [K,...] at their frames [F,...] -> both of its results, [K,...].

    `attend` takes c looks at each of f frames, [f,c,...] and [f,...], and gives [f,c,...]. On a CPU it is called for
    each run of frames that have equally many looks, on views of the frames. Where counting looks would wait for the
    device or break a graph, the frames are copied for each look instead.
    """
    if frame_of_look is None:
        out, lse = attend(looks[:, None], *frames)
        return out.flatten(0, 1), lse.flatten(0, 1)
    if frame_of_look.device.type != "cpu" or torch.compiler.is_compiling() or not len(frame_of_look):
        return attend_by_frame(attend, looks, tuple(t.index_select(0, frame_of_look) for t in frames), None)
    look, first = group_looks(frame_of_look, len(frames[0]))
    runs = [(c, len(list(same))) for c, same in itertools.groupby(first.diff().tolist())]
    looks_of = looks.index_select(0, look).split([c * f for c, f in runs])
    frames_of = zip(*(t.split([f for _, f in runs]) for t in frames))
    found = [attend(some.unflatten(0, (-1, c)), *rows) for (c, _), some, rows in zip(runs, looks_of, frames_of) if c]
    back = look.argsort()
    out, lse = (torch.cat([t.flatten(0, 1) for t in parts]).index_select(0, back) for parts in zip(*found))
    return out, lse


def on_gpu(inputs: Tensor) -> bool:
    """Whether "auto" may mean Triton for these."""
    return inputs.is_cuda


def uses_triton(op: str, implementation: str, inputs: Tensor, fits: bool, frames: Shapes, one: bool) -> bool:
    """Whether Triton runs: on a GPU where a kernel `fits` the shape, the type is bf16, fp16 or fp32 and it `launches`,
    or on request. Raises ValueError for an unknown implementation, and for "triton" where it cannot run."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    fits = fits and triton is not None and inputs.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if implementation == "triton":
        if not fits:
            raise ValueError(f"{op}: no Triton kernel for {inputs.dtype} {list(inputs.shape)}")
        if inputs.device.type != "cuda" and not ON_CPU:
            raise ValueError(f"{op}: Triton needs a GPU, or TRITON_INTERPRET=1 set before it is imported")
        return True
    return (
        implementation == "auto" and fits and on_gpu(inputs) and launches(op, inputs.device, inputs.dtype, frames, one)
    )


@torch.compiler.assume_constant_result  # asked while a caller is compiled, too
def launches(op: str, device: torch.device, dtype: torch.dtype, frames: Shapes, one: bool) -> bool:
    """Whether an operation's kernels launch, forward and backward: tried once, and a warning says why they do not.

    `frames` are the shapes [N,...,d] of one frame of its inputs, `one`: frame_of_look is None. They should be
    constants, not sizes of a tensor, which a compiler takes for variables.
    """
    return _launches(op, device, dtype, frames, one)


@functools.cache
def _launches(op: str, device: torch.device, dtype: torch.dtype, frames: Shapes, one: bool) -> bool:
    attend = getattr(torch.ops.fovlm_kernels, op)
    make = functools.partial(torch.zeros, device=device, dtype=dtype)
    groups = (None, None) if one else group_looks(make(2, dtype=torch.int64), 1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for trains in (True, False):  # of the encoder: its keys and values, or rows, have a gradient
                looks = make(1 if one else 2, 2, frames[0][-1], requires_grad=True)
                inputs = [make(1, *shape, requires_grad=trains) for shape in frames]
                out, _ = attend(looks, *inputs, *groups, 1.0)
                torch.autograd.grad(out.sum(), [looks, *inputs] if trains else [looks])
    except FAILURES as error:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        _warn(f"a Triton kernel does not launch on {name}, plain PyTorch takes its place: {reason_of(error)}")
        return False
    return True


@functools.cache
def _warn(message: str) -> None:
    """One warning for all kernels that fail alike."""
    log.warning(message)


def reason_of(error: BaseException) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@jit
def dot(left, right):
    """The matrix product, summed in fp32; fp32 inputs are not rounded to tf32."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision="ieee")


@jit
def load_rows(base, row, stride, N, width: tl.constexpr, MASKED: tl.constexpr):
    """Rows `row` of a [N,width] array; rows from N on are zeros, which cost no reading."""
    at = base + row[:, None] * stride + tl.arange(0, width)[None, :]
    if MASKED:
        return tl.load(at, mask=row[:, None] < N, other=0.0)
    else:
        return tl.load(at)


def dense_rows(inputs: Tensor) -> Tensor:
    """inputs, copied only when its last dimension is not contiguous (the kernels read rows of adjacent numbers)."""
    return inputs if inputs.stride(-1) == 1 else inputs.contiguous()
