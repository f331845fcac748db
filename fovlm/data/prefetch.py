"""Packs on their way to the device: each is copied while the one before it is computed."""

from collections.abc import Iterator

import torch

from fovlm.data.packing import Batch


class DeviceCopies:
    """Copies packs to `device`; on a GPU from page-locked memory, on a stream of its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ahead(self, batches: list[Batch]) -> Iterator[Batch]:
        """The packs on the device, one after the other.

        The copy of the next one starts before this one is launched, and that of the first while the GPU still computes
        the step before. The GPU waits for a copy, never the host.
        """
        if self.stream is None:
            yield from (batch.to(self.device) for batch in batches)
            return
        copied = self._start(batches[0], self.stream)
        for following in [*batches[1:], None]:
            (batch, done), current = copied, torch.cuda.current_stream(self.device)
            if following is not None:
                copied = self._start(following, self.stream)
            current.wait_event(done)
            batch.record_stream(current)  # its memory belongs to the other stream
            yield batch

    def _start(self, batch: Batch, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return batch.to(self.device), stream.record_event()
