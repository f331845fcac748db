"""Controls: the same questions with something taken away. What a model still gets right then, it did not see.

blind     no frames at all: what the words give away
shuffled  the frames in a random order: what can be told without time
repeated  one frame in place of all: what a single picture tells
foreign   each look has the query of another sample's look, with that one's question and clip: what the gaze is worth
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from fovlm.errors import UserError, did_you_mean
from fovlm.eval.likelihood import View

CONTROLS = ("blind", "shuffled", "repeated", "foreign")


def check(names: list[str]) -> None:
    """Raises UserError for a control that there is not."""
    for name in names:
        if name not in CONTROLS:
            raise UserError(f"no control '{name}'{did_you_mean(name, CONTROLS)}: there are {', '.join(CONTROLS)}")


def applies(control: str, visual: str, mode: str) -> bool:
    """Whether a control means something: a gaze can only be foreign where there are queries."""
    return control != "foreign" or (visual == "foveated" and mode != "coarse_only")


def under(control: str, view: View | None, other: View | None, key: str) -> View | None:
    """What is shown under a control ("" for none). `other` is the clip of another question, `key` seeds the order."""
    if view is None or control == "blind":
        return None
    if control == "shuffled":
        return replace(view, looks=view.looks[_order(len(view.looks), key).to(view.looks.device)])
    if control == "repeated":
        return replace(view, looks=view.looks[len(view.looks) // 2].expand(len(view.looks)))
    if control == "foreign" and other is not None:
        # The other clip is stretched or thinned to as many looks.
        at = torch.arange(len(view.looks), device=other.looks.device) * len(other.looks) // len(view.looks)
        return replace(view, gaze_of=replace(other, looks=other.looks[at]))
    return view


def _order(n: int, key: str) -> Tensor:
    """A permutation of n that is not the plain order (when n > 1), the same for the same key."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order if n < 2 or not torch.equal(order, torch.arange(n)) else order.roll(1)
