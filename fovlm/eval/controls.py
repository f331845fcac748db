"""Controls: the same questions with information removed. What a model still gets right, it did not see.

blind     no frames: what the texts give away
shuffled  the frames in random order: what can be answered without time
repeated  one frame in place of all: what a single picture shows
foreign   each look has the query of a look at another clip, after another question: what the model's own gaze adds
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from fovlm.errors import UserError, did_you_mean
from fovlm.eval.likelihood import View

CONTROLS = ("blind", "shuffled", "repeated", "foreign")


def check(names: list[str]) -> None:
    """Raises UserError for an unknown control."""
    for name in names:
        if name not in CONTROLS:
            raise UserError(f"no control '{name}'{did_you_mean(name, CONTROLS)}: there are {', '.join(CONTROLS)}")


def applies(control: str, visual: str, mode: str) -> bool:
    """Whether a control exists for a model: only models with queries have a gaze to replace."""
    return control != "foreign" or (visual == "foveated" and mode != "coarse_only")


def is_foreign(clip: object, question: Tensor, other_clip: object, other_question: Tensor) -> bool:
    """Whether looks at another item have a gaze of their own: another clip and, where questions come before the frames,
    another question. Questions are the tokens [p] before the frames."""
    return clip != other_clip and not (len(question) and torch.equal(question, other_question))


def apply_control(control: str, view: View | None, other: View | None, key: str) -> View | None:
    """The view under a control ("" for none). `other` is the view of another item, `key` seeds the order."""
    if view is None or control == "blind":
        return None
    if control == "shuffled":
        return replace(view, looks=view.looks[_order(len(view.looks), key).to(view.looks.device)])
    if control == "repeated":
        return replace(view, looks=view.looks[len(view.looks) // 2].expand(len(view.looks)))
    if control == "foreign" and other is not None:
        # The other clip's looks are repeated or thinned out to the same number.
        at = torch.arange(len(view.looks), device=other.looks.device) * len(other.looks) // len(view.looks)
        return replace(view, gaze_of=replace(other, looks=other.looks[at]))
    return view


def _order(n: int, key: str) -> Tensor:
    """A permutation of n, the same for the same key, and not the identity when n > 1."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order if n < 2 or not torch.equal(order, torch.arange(n)) else order.roll(1)
