"""Frames in shared buffers: written again when nobody reads them any more, and not before."""

import os
from dataclasses import replace
from itertools import islice
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from fovlm.data import handover
from fovlm.data.dataloader import PackLoader
from fovlm.data.packing import Batch, PackBudget, collate
from helpers import tiny
from helpers.models import sample

SAMPLES = [sample("a", 2, looks=2), sample("b", 1, looks=3), sample("c", text=5)]
SIZE = SAMPLES[0].frames.shape[-1]


def received(buffers: handover.FrameBuffers) -> Batch:
    """A batch of SAMPLES as the main process gets it."""
    handed = handover.Handed(collate(SAMPLES, SIZE, take=buffers.take))
    return ForkingPickler.loads(ForkingPickler.dumps(handed))


def test_a_batch_arrives_as_it_was_sent():
    expected, batch = collate(SAMPLES, SIZE), received(handover.FrameBuffers())
    assert batch.frames.stride() == expected.frames.stride()
    tensors: list[torch.Tensor] = []
    expected.mapped(tensors.append)
    batch.mapped(lambda tensor: torch.testing.assert_close(tensor, tensors.pop(0), rtol=0, atol=0))
    assert not tensors
    assert (batch.keys, batch.sizes, batch.sequence.lengths) == (
        expected.keys,
        expected.sizes,
        expected.sequence.lengths,
    )


def test_a_buffer_is_free_when_the_last_view_of_its_frames_is_gone():
    buffers = handover.FrameBuffers()
    batch = received(buffers)
    first = batch.frames.data_ptr()
    view = batch.frames[0, 0].numpy()
    del batch
    second = received(buffers)
    assert second.frames.data_ptr() != first
    second.frames.fill_(7)
    assert (view == SAMPLES[0].frames[0, 0].numpy()).all()
    del view
    assert received(buffers).frames.data_ptr() == first
    del second
    larger = buffers.take(10**6)
    assert len(larger) == 10**6
    assert len(buffers.buffers) == 2, "it takes the place of one that is too small"


def test_a_batch_that_fails_leaves_its_buffer_free():
    buffers = handover.FrameBuffers()
    with pytest.raises(RuntimeError):
        collate([replace(SAMPLES[0], frames=SAMPLES[0].frames[:, :2])], SIZE, take=buffers.take)
    assert [int(buffer[0]) for buffer in buffers.buffers] == [0]


def test_a_fork_of_the_reader_frees_no_buffer():
    buffers = handover.FrameBuffers()
    batch = received(buffers)
    if not (child := os.fork()):
        del batch
        os._exit(0)
    os.waitpid(child, 0)
    assert buffers.buffers[0][0] == 1
    del batch
    assert buffers.buffers[0][0] == 0


def test_more_batches_than_buffers_that_are_used_again(monkeypatch):
    monkeypatch.setattr(handover, "KEPT", 2)
    buffers = handover.FrameBuffers()
    batches = [received(buffers) for _ in range(4)]
    assert len({batch.frames.data_ptr() for batch in batches}) == 4
    assert len(buffers.buffers) == 2


def test_a_worker_overwrites_no_batch_that_is_read(tmp_path, monkeypatch):
    """The last five batches stay in use while the worker makes more."""
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path))
    data, steps = tiny.dataset(tmp_path), 24
    plain = [step.batches[0].frames for step in islice(PackLoader(data, PackBudget(240, 8), 1), steps)]
    held: list[Batch] = []
    for n, step in enumerate(islice(PackLoader(data, PackBudget(240, 8), 1, workers=1), steps)):
        held = [*held[-4:], step.batches[0]]
        for batch, frames in zip(held, plain[n + 1 - len(held) :], strict=False):
            assert torch.equal(batch.frames, frames)
