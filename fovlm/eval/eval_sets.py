"""What is scored: the questions of a benchmark, or the samples of prepared shards, one item at a time.

A set is named on the command line as NAME (looked for below --data) or NAME=PATH. mvbench, videomme, scienceqa and
pope are benchmarks as downloaded; any other name is shards: a folder, a manifest, a pattern, or a run's own.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer, TokenizedText
from fovlm.data.dataset import Dataset
from fovlm.data.index import MEDIA, open_indices
from fovlm.data.shards import find_shards
from fovlm.errors import SampleError, UserError, did_you_mean
from fovlm.eval.benchmarks import READERS, questions_of
from fovlm.eval.questions import drawn, frames_of, hash_of
from fovlm.fileio import digest
from fovlm.paths import cache_root

KIND = ", "  # between the name of a source and the kind of its samples
UNCUT = 2**31 - 1  # tokens of a text: what goes beyond a model's context is left out, never scored in part
TOO_LONG = "longer than the model's context with its frames"
Say = Callable[[str], None]


@dataclass
class Item:
    """Something to score. `looks` i64 [K] are numbers of its frames; `answer` is None for a loss alone.

    `texts` are the answers behind the question; their tokens with weight are scored. `clip` names what is shown.
    """

    number: int
    id: str
    category: str
    source: str
    modality: str  # text, image or video
    clip: str
    frames: Tensor  # u8 [f, 3, s, s]
    looks: Tensor
    texts: list[TokenizedText]
    answer: int | None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """How a model is asked: all that decides its tokens and frames, beside the questions."""

    chat: ChatTokenizer  # with loss "answer", the model's prompt order, and nothing cut (UNCUT)
    frame_size: int
    image_frames: int
    context: int  # positions of the language model
    per_look: int = 1  # tokens
    most: int = 64  # frames
    letters: bool = False  # options are listed in the question, and their letters are the answers

    def fits(self, texts: list[TokenizedText], looks: int) -> bool:
        """Whether the longest of the texts has room in the context beside so many looks."""
        return max(len(text.tokens) for text in texts) + looks * self.per_look <= self.context


class EvalSet(Protocol):
    """A set: its items by number, and what names it. `left_out` says how many questions are not in it, and why.

    `hash` names what is asked, whatever the model: two sets with one hash are the same questions.
    """

    name: str
    hash: str
    protocol: str
    left_out: dict[str, int]

    def __len__(self) -> int: ...
    def item(self, number: int) -> Item | str:
        """An item, or the reason why there is none. Raises UserError."""

    def hash_without(self, numbers: Collection[int]) -> str:
        """The hash of the set without some of its items: of what was scored."""


class Questions:
    """Multiple choice. Raises UserError for missing videos, unless they are skipped, and for an empty set.

    What is there and cannot be read is found when its turn comes, and treated alike.
    """

    def __init__(self, name: str, where: Path, form: Form, limit: int | None, skip_missing: bool, say: Say):
        self.name, self.form, self.skip = name, form, skip_missing
        every = questions_of(name, where)
        if not every:
            raise UserError(f"{name}: {where} has no questions")
        lost = [q for q in every if q.missing]
        self.left_out = {"their video or picture is missing": len(lost)} if lost else {}
        if lost:
            files = {str(q.missing) for q in lost}
            told = f"{name}: {len(files)} of {len({q.shown for q in every})} videos or pictures are missing, "
            told += f"the first is {lost[0].missing}"
            if not skip_missing:
                raise UserError(f"{told}; --skip-missing goes on without their {len(lost)} questions")
            if len(lost) == len(every):
                raise UserError(f"{told}; nothing is left to ask")
            say(f"{told}: going on without {len(lost)} of {len(every)} questions")
        self.questions = drawn([q for q in every if not q.missing], limit)
        self.hash = hash_of(self.questions)
        self.protocol = "likelihood of the option's letter" if form.letters else "likelihood of the option's text"

    def __len__(self) -> int:
        return len(self.questions)

    def item(self, number: int) -> Item | str:
        q, form = self.questions[number], self.form
        try:
            frames = frames_of(q, form.frame_size, form.most)
        except UserError as error:
            if self.skip:
                return "their video or picture cannot be read, or only in part"
            raise UserError(f"{self.name}, {error}; --skip-missing goes on without such questions") from error
        image = len(q.media) == len(frames) and all(_still(m) for m in q.media)
        texts = []
        for option in q.answers(form.letters):
            try:
                record = {"user": q.asked(form.letters), "assistant": option}
                texts.append(form.chat.text(record, None, bool(len(frames))))
            except SampleError as error:
                return f"{error}: the question or an option is empty"
        looks = torch.arange(len(frames)).repeat_interleave(form.image_frames if image else 1)
        if not form.fits(texts, len(looks)):
            return TOO_LONG
        return Item(
            number=number,
            id=q.id,
            category=q.category,
            source=self.name,
            modality=("image" if image else "video") if len(frames) else "text",
            clip=q.shown,
            frames=frames,
            looks=looks,
            texts=texts,
            answer=q.answer,
            extra=q.extra,
        )

    def hash_without(self, numbers: Collection[int]) -> str:
        return hash_of([q for n, q in enumerate(self.questions) if n not in numbers])


def _still(shown: Path | bytes) -> bool:
    return isinstance(shown, bytes) or (shown.is_file() and shown.suffix.lower() in (".jpg", ".jpeg", ".png"))


class Shards:
    """Samples whose answer's loss is measured, of any kind. `sources` are by name.

    Raises UserError for shards that were tokenized ahead with a loss on every token.
    """

    def __init__(self, name: str, sources: dict[str, DataSource], form: Form, limit: int | None):
        self.name, self.form, self.protocol = name, form, "loss of the answer"
        self.left_out: dict[str, int] = {}
        kinds = _by_kind(sources)
        self.data = Dataset(
            kinds,
            dict.fromkeys(kinds, 1.0),
            form.chat,
            frame_size=form.frame_size,
            max_frames=form.most,
            image_frames=form.image_frames,
        )
        counts = [self.data.samples[source] for source in self.data.mix.names]
        # Sources take turns, so among the first `turns` positions are all samples of each, and what repeats.
        turns = range(max(counts) * len(counts))
        there = [p for p in turns for source, number in [self.data.mix(p)] if number < counts[source]]
        of = [kinds[name].kind for name in self.data.mix.names]
        once = [p for p in there if of[self.data.mix(p)[0]] in (self.data.kind(p), "preference")]
        self.positions = sorted(sorted(once, key=_rank)[:limit])
        for position in {self.data.mix(p)[0]: p for p in reversed(once)}.values():  # the first one of each source
            with suppress(SampleError):
                if _on_every_token(self.data.record(position)):
                    told = f"{name}: its samples are tokenized for a loss on every token, and an answer's is measured"
                    raise UserError(f"{told}: make the set with --tokenize sft, or without")
        # The tokenizer belongs to it, since losses are per token; the prompt order and the frames do not.
        self.tokens = ChatTokenizer(form.chat.tokenizer, "after_frames", "answer", UNCUT).hash
        self.hash = self.hash_without(())

    def __len__(self) -> int:
        return len(self.positions)

    def item(self, number: int) -> Item | str:
        samples, bad = self.data.read(self.positions[number])
        if bad is not None or len(samples) != 1:
            return bad.cause if bad is not None else "a preference pair has no one answer"
        (sample,) = samples
        record, kind = self.data.record(self.positions[number]), self.data.kind(self.positions[number])
        if _on_every_token(record):
            return "tokenized for a loss on every token"
        texts = [TokenizedText(sample.tokens, sample.weight, sample.prompt)]
        if not self.form.fits(texts, sample.looks):
            return TOO_LONG
        f = len(sample.frames)
        return Item(
            number=number,
            id=sample.key,
            category="",
            source=str(record.get("source") or sample.source.partition(KIND)[0]),
            modality=kind,
            clip=sample.key,
            frames=sample.frames,
            looks=torch.arange(f) if sample.looks == f else torch.zeros(sample.looks, dtype=torch.int64),
            texts=texts,
            answer=None,
        )

    def hash_without(self, numbers: Collection[int]) -> str:
        kept = [p for n, p in enumerate(self.positions) if n not in numbers]
        told = {"of": self.data.asked, "tokens": self.tokens, "positions": kept}
        return digest(json.dumps(told))


def _on_every_token(record: dict[str, Any]) -> bool:
    """True for what `--tokenize stage1` makes: without it a question has no weight."""
    mask = record.get("loss_mask")
    return isinstance(mask, list) and bool(mask) and all(mask)


def _by_kind(sources: dict[str, DataSource]) -> dict[str, DataSource]:
    """A source for each kind of sample that there is: shards drawn for evaluation hold several."""
    found: dict[str, DataSource] = {}
    for name, source in sources.items():
        indices = open_indices(find_shards(name, source.shards), cache_root())
        for kind in [k for n, k in enumerate(MEDIA) if any((index.media == n).any() for index in indices)]:
            of = "preference" if source.kind == "preference" else kind
            found[f"{name}{KIND}{kind}"] = source.model_copy(update={"kind": of})
    return found


def _rank(position: int) -> bytes:
    return hashlib.blake2b(str(position).encode(), digest_size=8).digest()


def open_eval_set(
    spec: str,
    data: Path,
    form: Form,
    own: dict[str, dict[str, Any]],
    limit: int | None = None,
    skip_missing: bool = False,
    say: Say = print,
) -> EvalSet:
    """The set that `NAME` or `NAME=PATH` means. `own` are the validation sources of a run. Raises UserError."""
    name, _, path = spec.partition("=")
    if name in READERS:
        return Questions(name, Path(path) if path else data / name, form, limit, skip_missing, say)
    if path:
        return Shards(name, {name: DataSource(shards=_pattern(name, path), kind="video")}, form, limit)
    if name == "val" and own and not (data / "val").exists():
        return Shards(name, {key: DataSource(**value) for key, value in own.items()}, form, limit)
    for place in (data / name, data / f"{name}.json", data / f"{name}-*.tar"):
        if place.exists() or glob.glob(str(place)):
            return Shards(name, {name: DataSource(shards=_pattern(name, str(place)), kind="video")}, form, limit)
    known = [*READERS, *(p.name for p in data.iterdir() if p.is_dir())] if data.is_dir() else list(READERS)
    raise UserError(
        f"no set '{name}'{did_you_mean(name, known)}: there is no {data / name}; name it with {name}=PATH or --data"
    )


def _pattern(name: str, path: str) -> str:
    """Shards as one pattern: of a folder, beside a manifest, or as given."""
    where = Path(path)
    if where.name.endswith(".json") and where.is_file():
        where = where.parent
    if where.is_dir():
        for shape in (f"{name}-*.tar", "*.tar"):
            if any(where.glob(shape)):
                return str((where / shape).resolve())
        raise UserError(f"{name}: {where} holds no shards (*.tar)")
    return path if "://" in path or path.startswith("/") else str(Path.cwd() / path)
