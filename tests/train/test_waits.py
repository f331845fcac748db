"""A micro-step neither reads from its device nor copies to it, forward and backward: on a GPU the host would wait.

The device `meta` computes shapes alone, so that reading a value from it raises; what is copied to it is watched.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fovlm.train.losses import Loss, preference_loss
from helpers.models import pack, sample, tiny_model

PACKS = {
    "pairs": lambda: [sample(role, 2, role=role) for role in ("chosen", "rejected")],
    "video": lambda: [sample("v", 4), sample("w", 2, text=4)],
    "text": lambda: [sample("t", text=8)],
    "pictures of several looks": lambda: [sample("p", 1, 4), sample("q", 2)],
    "question before the frames": lambda: [sample("b", 3, text=9, prompt=4)],
}


class Copies(TorchFunctionMode):
    """Calls that copy from the host: they take a tensor of the host, or values, and give one of the device."""

    MAKERS = (torch.tensor, torch.as_tensor)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), out)
        )
        if "meta" in after and ("cpu" in before or func in self.MAKERS):
            self.found.append(f"{torch.overrides.resolve_name(func)} {args}")
        return out


def micro_step(kind: str, objective: str, **settings) -> list[str]:
    """The copies from the host in the forward and backward pass of one pack."""
    model, batch = tiny_model(**settings).to("meta"), pack(PACKS[kind]()).to("meta")
    with Copies() as copies:
        if objective == "text":
            loss = Loss(model(batch, weight=batch.weight), {})
        else:
            nll = model(batch)
            loss = preference_loss(nll, nll.detach(), batch, 0.1)
        loss.total.backward()
    assert all(p.grad is not None for p in model.connector.query_in.parameters()), "the backward pass ran"
    return copies.found


@pytest.mark.parametrize("kind", PACKS)
def test_a_micro_step_waits_for_nothing(kind):
    assert not micro_step(kind, "text")


@pytest.mark.parametrize("settings", [{"query_rounds": 2}, {"deep_query": False}, {"visual": "coarse"}])
def test_nor_does_it_in_other_ways_of_looking(settings):
    assert not micro_step("video", "text", **settings)


def test_nor_do_preferences():
    assert not micro_step("pairs", "dpo")


def test_copies_and_reads_would_be_seen():
    device = torch.ones(2, device="meta")
    for copy in (lambda: torch.tensor([1.0, 2.0], device="meta"), lambda: torch.ones(2).to("meta")):
        with Copies() as copies:
            _ = device + copy()
        assert copies.found
    for read in (lambda: float(device.sum()), device.nonzero, lambda: device[device > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
