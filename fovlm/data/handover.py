"""A worker's batches on their way to the main process: frames in shared memory that is used again, the rest pickled.

torch's loader would move every tensor into fresh shared memory: the system hands out and clears its pages one by one,
and each tensor passes a file descriptor over a socket.
"""

import os
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fovlm.data.packing import Batch

HEAD = 64  # bytes before the frames; the first is 1 from when a batch is in the buffer until nobody reads it any more
KEPT = 32  # buffers of a worker that are used again; more than a rank holds of a worker's packs at a time


def buffer_bytes(size: int) -> int:
    """The bytes of a new buffer for a batch with `size` bytes of frames: with room for a larger one."""
    return HEAD + size * 5 // 4


class FrameBuffers:
    """The shared buffers of one worker."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """Memory u8 [size] that nobody reads: a buffer that is free again, or a new one. `Handed` makes it busy."""
        free = [n for n, buffer in enumerate(self.buffers) if not buffer[0]]
        fits = [n for n in free if len(self.buffers[n]) >= HEAD + size]
        if fits:
            buffer = self.buffers[fits[0]]
        else:
            buffer = torch.empty(buffer_bytes(size), dtype=torch.uint8).share_memory_()
            buffer[0] = 0
            if free:
                self.buffers[free[0]] = buffer
            elif len(self.buffers) < KEPT:
                self.buffers.append(buffer)
        return buffer[HEAD : HEAD + size]


class Handed:
    """A batch with its frames in a buffer. Unpickled it is the batch; the buffer is free when no view is left of it."""

    def __init__(self, batch: Batch):
        self.batch = batch
        batch.frames.as_strided([1], [1], 0).fill_(1)

    def __reduce__(self) -> tuple[Any, ...]:
        frames = self.batch.frames
        buffer = frames.as_strided([HEAD + frames.numel()], [1], 0)
        rest = replace(self.batch, frames=torch.empty(0)).mapped(Tensor.numpy, Tensor)
        return _receive, (rest, buffer, frames.shape, frames.stride())


def _receive(rest: Batch, buffer: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Batch:
    memory = buffer.numpy()[HEAD:]  # every view of the frames keeps this object alive
    weakref.finalize(memory, _release, buffer, os.getpid()).atexit = False
    frames = torch.from_numpy(memory).as_strided(shape, stride)
    return replace(rest.mapped(torch.from_numpy, np.ndarray), frames=frames)


def _release(buffer: Tensor, reader: int) -> None:
    if os.getpid() == reader:  # a fork drops its own copy alone
        buffer[0] = 0
