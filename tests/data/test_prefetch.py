"""Copies to a GPU, with a stand-in for its streams: what is asked of them, and in which order."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fovlm.data.packing import Batch
from fovlm.data.prefetch import DeviceCopies
from helpers.models import pack, sample

BATCHES = [pack([sample(name, 2)]) for name in "abc"]


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Every request to the streams `side` and `main`, and every copy."""
    asked: list[str] = []
    on = ["main"]

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            record_event=lambda: f"event {len([a for a in asked if a.startswith('copy')])}",
            wait_event=lambda event: asked.append(f"{name} waits for {event}"),
        )

    @contextmanager
    def within(used):
        on.append(used.name)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(Batch, "to", lambda batch, device: asked.append(f"copy {batch.keys[0]} on {on[-1]}") or batch)
    monkeypatch.setattr(Batch, "record_stream", lambda b, used: asked.append(f"{used.name} holds {b.keys[0]}"))
    return asked


def test_the_next_pack_is_copied_before_this_one_is_computed(asked):
    for batch in DeviceCopies(torch.device("cuda", 0)).ahead(BATCHES):
        asked.append(f"compute {batch.keys[0]}")
    assert asked == [
        *("copy a on side", "copy b on side", "main waits for event 1", "main holds a", "compute a"),
        *("copy c on side", "main waits for event 2", "main holds b", "compute b"),
        *("main waits for event 3", "main holds c", "compute c"),
    ]


def test_every_tensor_of_a_pack_is_held_by_the_stream_that_computes():
    held = []
    tensors = [*vars(BATCHES[0]).values(), *vars(BATCHES[0].sequence).values(), *vars(BATCHES[0].prefix).values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: held.append(id(tensor)))
        BATCHES[0].record_stream(torch.Stream("cpu"))
    assert set(held) == {id(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)}


def test_a_cpu_needs_no_copies():
    (batch,) = DeviceCopies(torch.device("cpu")).ahead(BATCHES[:1])
    assert batch.frames is BATCHES[0].frames
