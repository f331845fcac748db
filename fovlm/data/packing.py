"""Packs: which samples share one, and the position of every token.

A pack holds the samples of one micro step. Samples are dealt to packs by cost, and a pack's tensors are as large as its
samples, rounded up by at most one part in 32, so that a run has a short list of shapes. Inside a sample the order is

    prompt text | one visual token for each look | the rest of the text

with an empty prompt part for the question `after_frames`. Positions restart at every sample and attention never crosses
samples: `Layout.lengths` divides the sequence, and padding at its end is a segment of its own (-1).

Several conversations over the same frames follow each other in a pack and share the encoded frames (`frame_of_look`);
each has looks of its own, and sees nothing of the others.

Letters: F unique frames, K looks, S text tokens, P text tokens ahead of the frames, T visual tokens of one look
(1, or more for `multi_token`), L positions of the packed sequence.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fovlm.errors import UserError

PADDING = -1
BOUNDS = 32  # cu_seqlens has a multiple of so many entries, so that its length hardly changes
BITS = 6  # significant bits of a pack's dimensions


@dataclass(frozen=True)
class PackSize:
    """Size of a sample or a pack: unique frames, looks, text tokens, text tokens ahead of the frames, and frames that
    further conversations see again."""

    frames: int
    looks: int
    text: int
    prompt: int
    shared: int = 0

    def __add__(self, other: "PackSize") -> "PackSize":
        return PackSize(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(PackSize)))

    def fits(self, other: "PackSize") -> bool:
        """True when no part that has tensors is larger than the other's."""
        return all(getattr(self, f.name) <= getattr(other, f.name) for f in fields(PackSize) if f.name != "shared")


EMPTY = PackSize(0, 0, 0, 0)


@dataclass(frozen=True)
class PackBudget:
    """What a pack may cost, in text tokens, and how many of them one frame counts as; seen again, it counts as one.

    A function of the data alone, so that runs which differ in the model, in what is frozen or in the number of looks
    take the same samples in a step, and are scored on the same validation samples.
    """

    cost: int
    frame: int

    def of(self, sizes: np.ndarray) -> np.ndarray:
        """The costs i64 [n] of samples of sizes [n, 5], the parts of a `PackSize`."""
        return sizes[:, 0].astype(np.int64) * self.frame + sizes[:, 2] + sizes[:, 4]

    def holds(self, size: PackSize) -> bool:
        """Whether samples of this size together fit into one pack."""
        return size.frames * self.frame + size.text + size.shared <= self.cost


@dataclass
class Sample:
    """One conversation over f frames, decoded and tokenized.

    `looks` is f for a video, `image_frames` for an image (f = 1) and 0 for text. `weight` is each token's share in the
    loss, `prompt` the number of tokens ahead of the frames. `role` is "chosen" or "rejected" in a preference pair,
    whose two samples are neighbours in one pack. With `shares`, `frames` are those of the sample before it in a pack.
    """

    key: str
    source: str
    frames: Tensor  # u8 [f, 3, height, width]
    looks: int
    tokens: Tensor  # i64 [s]
    weight: Tensor  # f32 [s]
    prompt: int = 0
    role: str = ""
    shares: bool = False

    @property
    def size(self) -> PackSize:
        f = len(self.frames)
        frames, shared = (0, f) if self.shares else (f, 0)
        return PackSize(frames, self.looks, len(self.tokens), self.prompt, shared)


@dataclass
class Layout:
    """A packed sequence of M positions: where each one's embedding comes from, and who may see whom.

    `slot` indexes cat(visual tokens [K * T], text tokens [S]); `position` restarts at 0 in every sample; `segment` is
    the sample's number in the pack, or -1 for padding. `lengths` are those of the samples and of the padding, in their
    order; `cu_seqlens` where each starts, then M as often as a multiple of BOUNDS takes.
    """

    slot: Tensor  # i64 [M]
    position: Tensor  # i64 [M]
    segment: Tensor  # i64 [M]
    lengths: list[int]
    cu_seqlens: Tensor  # i32


@dataclass
class Batch:
    """One pack, see `collate` for its shape.

    `sequence` is the whole pack [L]; `prefix` holds each sample only up to its last look, which is all that the coarse
    pass needs. Index tensors point to "none" with -1.
    """

    frames: Tensor  # u8 [F, 3, height, width]
    frame_of_look: Tensor | None  # i64 [K]; None when every frame has one look: look k sees frame k
    tokens: Tensor  # i64 [S]
    weight: Tensor  # f32 [S]; 0 where padded
    text_segment: Tensor  # i64 [S]; the sample of each text token, -1 where padded
    predict_from: Tensor  # i64 [S] -> [L]: the position before each text token; -1 at a sample's first position
    query_from: Tensor  # i64 [K] -> prefix: the position before each look; -1: use q_first
    look_segment: Tensor  # i64 [K]; the sample of each look, -1 where padded
    sequence: Layout
    prefix: Layout
    keys: list[str]
    sources: list[str]
    roles: list[str]
    sizes: list[PackSize]
    bad: list["SampleIssue"] = field(default_factory=list)

    @property
    def used(self) -> PackSize:
        """The size of its samples together."""
        return sum(self.sizes, EMPTY)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy with every tensor on `device`."""
        return self.mapped(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; torch's DataLoader calls this by name."""
        return self.mapped(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor until `stream` has done what was launched on it so far."""
        self.mapped(lambda t: t.record_stream(stream))

    def mapped(self, move: Callable[[Any], Any], kind: type = Tensor) -> "Batch":
        """A copy with `move` applied to every tensor (or other `kind` of array)."""

        def moved(value):
            if isinstance(value, kind):
                return move(value)
            if isinstance(value, Layout):
                return replace(value, **{k: move(v) for k, v in vars(value).items() if isinstance(v, kind)})
            return value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class SampleIssue:
    """A broken sample that was replaced or left out: for the counts and the log."""

    cause: str
    source: str
    shard: str
    key: str


def pack_samples(sizes: np.ndarray, packs: int, budget: PackBudget, deal_to: int = 0) -> tuple[list[list[int]], int]:
    """Deal consecutive samples of sizes [n, 5] to the packs of one step -> the samples of each pack, how many in all.

    A step takes samples, in their order, up to the budget of `packs` packs together, and ends before one that would
    make a pack exceed its budget. `deal_to` packs (default: `packs`), at least as many, share them: the number of packs
    changes with the number of ranks, the samples of a step do not.
    Raises UserError when a sample exceeds the budget by itself.
    """
    costs = budget.of(sizes)
    if len(costs) and costs.max() > budget.cost:
        frames, _, text, _, _ = sizes[costs.argmax()]
        raise UserError(
            f"a sample of {frames} frames and {text} text tokens costs {costs.max()}, more than a pack "
            f"(data.pack_cost={budget.cost}, data.frame_cost={budget.frame}): raise data.pack_cost"
        )
    ends = costs.cumsum()
    limit = packs * budget.cost
    while True:
        taken = int(np.searchsorted(ends, limit, side="right"))
        contents, largest = _deal(sizes[:taken], costs, packs)
        if largest <= budget.cost:
            break
        limit = int(ends[taken - 1]) * budget.cost // largest  # at least one sample less
    if deal_to > packs:
        contents, _ = _deal(sizes[:taken], costs, deal_to)
    return contents, taken


def _deal(sizes: np.ndarray, costs: np.ndarray, packs: int) -> tuple[list[list[int]], int]:
    """Each sample to the pack that costs least so far, those with most frames first -> contents, the largest cost."""
    contents: list[list[int]] = [[] for _ in range(packs)]
    heap = [(0, j) for j in range(packs)]
    for i in np.lexsort((-sizes[:, 2], -sizes[:, 0])).tolist():
        cost, j = heap[0]
        contents[j].append(i)
        heapq.heapreplace(heap, (cost + int(costs[i]), j))
    for content in contents:
        content.sort()
    return contents, max(cost for cost, _ in heap)


def round_up(n: int) -> int:
    """n rounded up to BITS significant bits: 32 values between two powers of two, at most n / 32 more."""
    step = 1 << max(0, n.bit_length() - BITS)
    return -(-n // step) * step


def pack_shape(used: PackSize, one_look_each: bool) -> PackSize:
    """The dimensions of a pack's tensors, for samples that take `used`."""
    frames = round_up(max(used.frames, 1))  # the vision path runs in every pack: ranks wait for its gradients
    looks = frames if one_look_each else round_up(max(used.looks, 1))
    return PackSize(frames, looks, round_up(max(used.text, 1)), round_up(used.prompt))


def collate(
    samples: list[Sample],
    frame_size: int,
    tokens_per_look: int = 1,
    bad: list[SampleIssue] | None = None,
    size: PackSize | None = None,
    take: Callable[[int], Tensor] | None = None,
) -> Batch:
    """Lay the samples out in one pack, in the order given; every frame must be [3, frame_size, frame_size].

    The pack has the samples' own size, rounded up, or `size`. Raises ValueError when that is too small. `take` gives
    memory u8 [bytes] for the frames.
    """
    T = tokens_per_look
    used = sum((s.size for s in samples), EMPTY)
    one_look_each = all(s.looks == s.size.frames for s in samples)
    shape = size or pack_shape(used, one_look_each)
    if not used.fits(shape):
        raise ValueError(f"{used} does not fit into {shape}")
    F, K, S = shape.frames, shape.looks, shape.text
    one_look_each &= K == F
    whole, ahead = used.looks * T + used.text, used.looks * T + used.prompt
    if size:
        whole, ahead = K * T + S, K * T + shape.prompt

    room = 3 * F * frame_size**2
    pixels = take(room) if take else torch.empty(room, dtype=torch.uint8)
    batch = Batch(
        frames=pixels.view(F, frame_size, frame_size, 3).permute(0, 3, 1, 2),  # as decoders write
        # Padding looks are spread over the frames: a kernel that takes a frame's looks together has no long tail.
        frame_of_look=None if one_look_each else torch.arange(K) % F,
        tokens=torch.zeros(S, dtype=torch.int64),
        weight=torch.zeros(S),
        text_segment=torch.full((S,), PADDING),
        predict_from=torch.full((S,), PADDING),
        query_from=torch.full((K,), PADDING),
        look_segment=torch.full((K,), PADDING),
        sequence=_padding(round_up(max(whole, 1))),
        prefix=_padding(round_up(max(ahead, 1))),
        keys=[s.key for s in samples],
        sources=[s.source for s in samples],
        roles=[s.role for s in samples],
        sizes=[s.size for s in samples],
        bad=bad or [],
    )
    frame = look = text = at = prefix_at = 0  # how much of F, K, S, L and the prefix is taken
    for number, sample in enumerate(samples):
        f, k, s, p = len(sample.frames), sample.looks, len(sample.tokens), sample.prompt
        if sample.shares:
            frame -= f  # those of the sample before
        visual = torch.arange(look * T, (look + k) * T)
        words = K * T + torch.arange(text, text + s)
        _place(batch.sequence, at, interleave(words, visual, p), number)
        stand = text_positions(s, p, k * T)
        batch.predict_from[text : text + s] = torch.where(stand > 0, at + stand - 1, PADDING)
        if k:
            _place(batch.prefix, prefix_at, torch.cat([words[:p], visual]), number)
            before = torch.arange(k) * T + p - 1
            batch.query_from[look : look + k] = torch.where(before >= 0, prefix_at + before, PADDING)
            prefix_at += p + k * T
        batch.frames[frame : frame + f] = sample.frames
        if batch.frame_of_look is not None and k:
            # An image's looks all see its one frame; a video has a look for each.
            batch.frame_of_look[look : look + k] = frame + (torch.arange(k) if k == f else torch.zeros(k)).long()
        batch.tokens[text : text + s] = sample.tokens
        batch.weight[text : text + s] = sample.weight
        batch.text_segment[text : text + s] = number
        batch.look_segment[look : look + k] = number
        frame, look, text, at = frame + f, look + k, text + s, at + k * T + s
    batch.frames[frame:] = 0
    # Padded positions read the slots that no sample took, as far as there are any.
    free = torch.cat([torch.arange(look * T, K * T), K * T + torch.arange(text, S)])
    for layout in (batch.sequence, batch.prefix):
        _close(layout, free if len(free) else torch.arange(K * T))
    return batch


def text_positions(text: int, prompt: int, visual: int, device: torch.device | str = "cpu") -> Tensor:
    """The position i64 [text] of each text token of a sample: token i is at i, or behind the `visual` tokens when it is
    not among the first `prompt`."""
    i = torch.arange(text, device=device)
    return i + (i >= prompt) * visual


def interleave(words: Tensor, visual: Tensor, prompt: int) -> Tensor:
    """The sequence of a sample: its first `prompt` words, the visual tokens, the rest of its words."""
    return torch.cat([words[:prompt], visual.to(words.dtype), words[prompt:]])


def _padding(length: int) -> Layout:
    zeros = torch.zeros(length).long()
    return Layout(zeros, zeros.clone(), torch.full((length,), PADDING), [], zeros.int())


def _close(layout: Layout, slots: Tensor) -> None:
    """Make one segment of the positions behind the samples, which read the slots in turn, and count the segments."""
    M = len(layout.slot)
    left = M - sum(layout.lengths)
    layout.lengths += [left] if left else []
    layout.position[M - left :] = torch.arange(left)
    layout.slot[M - left :] = slots[torch.arange(left) % len(slots)]
    ends = torch.tensor([0, *layout.lengths]).cumsum(0).int()
    layout.cu_seqlens = nnf.pad(ends, (0, -len(ends) % BOUNDS), value=M)


def _place(layout: Layout, at: int, slots: Tensor, segment: int) -> None:
    end = at + len(slots)
    layout.slot[at:end] = slots
    layout.position[at:end] = torch.arange(len(slots))
    layout.segment[at:end] = segment
    layout.lengths.append(len(slots))
