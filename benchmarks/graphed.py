"""A CUDA graph of the forward and the backward pass of a pack, for the benchmark of a step."""

import torch

from fovlm.data.packing import Batch
from fovlm.model.modeling import FoveatedVLM


class Graphed(torch.nn.Module):
    """The loss of packs shaped like `batch`, from their tensors alone: what torch.cuda.make_graphed_callables takes."""

    def __init__(self, model: FoveatedVLM, batch: Batch):
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        batch = self.batch.mapped(lambda t: next(given))
        return FoveatedVLM.forward(self.model, batch, weight=batch.weight)


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.mapped(found.append)
    return found


def use_graph(model: FoveatedVLM, batch: Batch) -> None:
    """Make `model(batch, weight)` for packs shaped like this one, and its backward pass, replays of a CUDA graph."""
    net, sample = Graphed(model, batch), tuple(tensors_of(batch))
    replay = torch.cuda.make_graphed_callables(net, sample, allow_unused_input=True)
    model.forward = lambda batch, visual=None, weight=None: replay(*tensors_of(batch))  # type: ignore[method-assign]
