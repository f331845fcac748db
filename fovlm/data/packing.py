"""Samples packed to a fixed budget: what goes in, and where every token stands.

A pack holds several samples. Its shape never changes from step to step (F frames, K looks, S text tokens), so a
compiled step compiles once and memory holds no surprises; what is left over is padding. Inside a sample the order is

    prompt text | one visual token for each look | the rest of the text

with an empty prompt part for the prompt order `after`. Positions restart at every sample and attention never crosses
samples: `Layout.segment` says who belongs together, and padding is a segment of its own (-1).

Letters: F unique frames, K looks, S text tokens, P text tokens ahead of the frames, T visual tokens of one look
(1, or 16 for `multi_token`), L = K * T + S positions of the packed sequence.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fovlm.errors import UserError

PADDING = -1
BOUNDS = 32  # cu_seqlens has a multiple of so many entries, so that its length hardly changes


@dataclass(frozen=True)
class PackSize:
    """What one sample takes of a pack: unique frames, looks, text tokens, and text tokens ahead of the frames."""

    frames: int
    looks: int
    text: int
    prompt: int

    def __add__(self, other: "PackSize") -> "PackSize":
        return PackSize(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(PackSize)))

    def fits(self, budget: "PackSize") -> bool:
        """True when every part is within the budget's."""
        return all(getattr(self, f.name) <= getattr(budget, f.name) for f in fields(PackSize))


EMPTY = PackSize(0, 0, 0, 0)


@dataclass
class Sample:
    """One conversation over f frames, decoded and tokenized.

    `looks` is f for a video, `image_frames` for an image (f = 1) and 0 for text. `weight` is each token's share in the
    loss (0 or 1), `prompt` the number of tokens that stand ahead of the frames. `role` is "chosen" or "rejected" in a
    preference pair, whose two samples follow each other in one pack.
    """

    key: str
    source: str
    frames: Tensor  # u8 [f, 3, height, width]
    looks: int
    tokens: Tensor  # i64 [s]
    weight: Tensor  # f32 [s]
    prompt: int = 0
    role: str = ""

    @property
    def size(self) -> PackSize:
        return PackSize(len(self.frames), self.looks, len(self.tokens), self.prompt)


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
    """One pack. Every tensor has the shape that the budget gives it, whatever the pack holds.

    `sequence` is the whole pack [L]; `prefix` [K + P] holds each sample only up to its last look, which is all that
    the coarse pass needs. Index tensors point to "none" with -1.
    """

    frames: Tensor  # u8 [F, 3, height, width]
    frame_of_look: Tensor | None  # i64 [K]; None when every frame has one look: look k sees frame k
    tokens: Tensor  # i64 [S]
    weight: Tensor  # f32 [S]; 0 where padded
    text_segment: Tensor  # i64 [S]; the sample of each text token, -1 where padded
    predict_from: Tensor  # i64 [S] -> [L]: the position before each text token; -1 at a sample's first position
    query_from: Tensor  # i64 [K] -> [K + P]: the prefix position before each look; -1: use q_first
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
        """What the samples took of the budget."""
        return sum(self.sizes, EMPTY)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy with every tensor on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; torch's DataLoader calls this by name."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, move) -> "Batch":
        def moved(value):
            if isinstance(value, Tensor):
                return move(value)
            if isinstance(value, Layout):
                return replace(value, **{k: move(v) for k, v in vars(value).items() if isinstance(v, Tensor)})
            return value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class SampleIssue:
    """A broken sample that was replaced or left out: for the journal's counts and the log."""

    cause: str
    source: str
    shard: str
    key: str


def pack_samples(sizes: Iterable[PackSize], packs: int, budget: PackSize) -> tuple[list[list[int]], int]:
    """Spread consecutive samples over the packs of one step, first fit.

    Takes sizes in order; sample i goes into the first pack with room. The step closes at the first sample that fits
    nowhere, so a step always holds a run of consecutive samples and the cursor stays one integer.

    Returns the sample numbers (counted from the first size given) of each pack, and how many samples were taken.
    Raises UserError when a sample does not fit into an empty pack.
    """
    contents: list[list[int]] = [[] for _ in range(packs)]
    filled = [EMPTY] * packs
    taken = 0
    for size in sizes:
        if not size.fits(budget):
            raise UserError(
                f"a sample of {size.frames} frames, {size.looks} looks and {size.text} text tokens ({size.prompt} "
                f"ahead of the frames) does not fit into a pack of {budget.frames} frames, {budget.looks} looks and "
                f"{budget.text} text tokens ({budget.prompt}): raise data.pack_frames or data.pack_tokens"
            )
        home = next((j for j in range(packs) if (filled[j] + size).fits(budget)), None)
        if home is None:
            break
        contents[home].append(taken)
        filled[home] += size
        taken += 1
    return contents, taken


def collate(
    samples: list[Sample],
    budget: PackSize,
    frame_size: int,
    tokens_per_look: int = 1,
    bad: list[SampleIssue] | None = None,
) -> Batch:
    """Lay the samples out in one pack, in the order given, and pad it to the budget.

    Raises ValueError when they do not fit; every frame must be [3, frame_size, frame_size].
    """
    F, K, S, P, T = budget.frames, budget.looks, budget.text, budget.prompt, tokens_per_look
    used = sum((s.size for s in samples), EMPTY)
    if not used.fits(budget):
        raise ValueError(f"{used} does not fit into {budget}")
    one_look_each = K == F
    if one_look_each and any(s.looks != len(s.frames) for s in samples):
        raise ValueError("a budget with as many looks as frames needs one look for every frame")

    batch = Batch(
        frames=torch.zeros(F, 3, frame_size, frame_size, dtype=torch.uint8),
        # Padding looks are spread over the frames: a kernel that takes a frame's looks together has no long tail.
        frame_of_look=None if one_look_each else torch.arange(K) % F,
        tokens=torch.zeros(S, dtype=torch.int64),
        weight=torch.zeros(S),
        text_segment=torch.full((S,), PADDING),
        predict_from=torch.full((S,), PADDING),
        query_from=torch.full((K,), PADDING),
        look_segment=torch.full((K,), PADDING),
        sequence=_padding(K * T + S),
        prefix=_padding(K * T + P),
        keys=[s.key for s in samples],
        sources=[s.source for s in samples],
        roles=[s.role for s in samples],
        sizes=[s.size for s in samples],
        bad=bad or [],
    )
    frame = look = text = at = prefix_at = 0  # how much of F, K, S, L and the prefix is taken
    for number, sample in enumerate(samples):
        f, k, s, p = sample.size.frames, sample.looks, len(sample.tokens), sample.prompt
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
    # Every slot must stand somewhere: what no sample took fills the padded end.
    left = torch.cat([torch.arange(look * T, K * T), K * T + torch.arange(text, S)])
    batch.sequence.slot[at:] = left
    _close(batch.sequence)
    _close(batch.prefix)
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


def _close(layout: Layout) -> None:
    """Count the segments once everything is in its place; what is left is one more segment."""
    left = len(layout.slot) - sum(layout.lengths)
    layout.lengths += [left] if left else []
    layout.position[len(layout.slot) - left :] = torch.arange(left)
    ends = torch.tensor([0, *layout.lengths]).cumsum(0).int()
    layout.cu_seqlens = nnf.pad(ends, (0, -len(ends) % BOUNDS), value=len(layout.slot))


def _place(layout: Layout, at: int, slots: Tensor, segment: int) -> None:
    end = at + len(slots)
    layout.slot[at:end] = slots
    layout.position[at:end] = torch.arange(len(slots))
    layout.segment[at:end] = segment
    layout.lengths.append(len(slots))
