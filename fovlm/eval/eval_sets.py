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
from typing import Any

import torch
from torch import Tensor

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer, TokenizedText, conversations
from fovlm.data.dataset import Dataset
from fovlm.data.index import MEDIA, open_indices
from fovlm.data.shards import find_shards
from fovlm.errors import SampleError, UserError, did_you_mean
from fovlm.eval.benchmarks import IMAGES, READERS, read_questions
from fovlm.eval.questions import frames_of, hash_questions, subset
from fovlm.fileio import digest
from fovlm.paths import cache_root

SEPARATOR = ", "  # between the name of a source and the kind of its samples
UNCUT = 2**31 - 1  # maximum text tokens: texts beyond the model's context are skipped, never truncated
MISSING = "media file missing"
UNREADABLE = "media unreadable or incomplete"
TOO_LONG = "longer than the model's context with its frames"
EVERY_TOKEN = "tokenized for a loss on every token"
Log = Callable[[str], None]


@dataclass
class EvalItem:
    """Something to score. `texts` are the question with each answer; their tokens with weight are scored."""

    number: int
    id: str
    category: str
    source: str
    modality: str  # text, image or video
    clip: str  # identifies the frames
    frames: Tensor  # u8 [f, 3, s, s]
    looks: Tensor  # i64 [K], numbers of frames
    texts: list[TokenizedText]
    answer: int | None = None  # number of the right text; None: the loss alone
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> Tensor:
        """The tokens i64 [p] before the frames: the same for all texts."""
        return self.texts[0].tokens[: self.texts[0].prompt]


@dataclass(frozen=True)
class InputFormat:
    """How a model is asked: everything besides the questions that decides its tokens and frames."""

    chat: ChatTokenizer  # with loss "answer", the model's position of the question, and no truncation (UNCUT)
    frame_size: int
    image_frames: int
    context: int  # positions of the language model
    tokens_per_look: int = 1
    max_frames: int = 64
    letters: bool = False  # options are listed in the question, and their letters are the answers

    def fits(self, texts: list[TokenizedText], looks: int) -> bool:
        """Whether the longest text fits into the context with so many looks."""
        return max(len(text.tokens) for text in texts) + looks * self.tokens_per_look <= self.context


class QuestionSet:
    """The items of a multiple-choice benchmark.

    `hash` identifies what is asked, whatever the model; `skipped` counts questions without their media. Raises
    UserError for an empty set, and for missing media unless `skip_missing`.
    """

    def __init__(self, name: str, where: Path, form: InputFormat, limit: int | None, skip_missing: bool, log: Log):
        self.name, self.form, self.skip_missing = name, form, skip_missing
        questions = read_questions(name, where)
        if not questions:
            raise UserError(f"{name}: {where} has no questions")
        missing = [q for q in questions if q.missing]
        self.skipped = {MISSING: len(missing)} if missing else {}
        if missing:
            files, clips = {str(q.missing) for q in missing}, {q.media_key for q in questions}
            message = f"{name}: {len(files)} of {len(clips)} videos or pictures are missing, "
            message += f"the first is {missing[0].missing}"
            if not skip_missing:
                raise UserError(f"{message}; --skip-missing skips their {len(missing)} questions")
            if len(missing) == len(questions):
                raise UserError(f"{message}; no question is left")
            log(f"{message}: skipping {len(missing)} of {len(questions)} questions")
        self.questions = subset([q for q in questions if not q.missing], limit)
        self.hash = self.hash_without(())
        self.protocol = "likelihood of the option's letter" if form.letters else "likelihood of the option's text"

    def __len__(self) -> int:
        return len(self.questions)

    def item(self, number: int) -> EvalItem | str:
        """An item, or the reason why it is skipped. Raises UserError for unreadable media, like for missing ones."""
        q, form = self.questions[number], self.form
        try:
            frames = frames_of(q, form.frame_size, form.max_frames)
        except UserError as error:
            if self.skip_missing:
                return UNREADABLE
            raise UserError(f"{self.name}, {error}; --skip-missing skips such questions") from error
        still = (isinstance(m, bytes) or (m.is_file() and m.suffix.lower() in IMAGES) for m in q.media)
        image = len(q.media) == len(frames) and all(still)
        texts = []
        for option in q.answers(form.letters):
            try:
                record = {"user": q.prompt(form.letters), "assistant": option}
                texts.append(form.chat.text(record, None, bool(len(frames))))
            except SampleError as error:
                return f"{error}: the question or an option is empty"
        looks = torch.arange(len(frames)).repeat_interleave(form.image_frames if image else 1)
        if not form.fits(texts, len(looks)):
            return TOO_LONG
        modality = ("image" if image else "video") if len(frames) else "text"
        shown = (q.media_key, frames, looks, texts)
        return EvalItem(number, q.id, q.category, self.name, modality, *shown, q.answer, q.extra)

    def hash_without(self, numbers: Collection[int]) -> str:
        """The hash of the set without some of its items."""
        return hash_questions([q for n, q in enumerate(self.questions) if n not in numbers])


class ShardSet:
    """The samples of shards, of any kind, whose answer's loss is measured. `hash` and methods as of QuestionSet. Raises
    UserError for shards that are tokenized for a loss on every token."""

    protocol = "loss of the answer"

    def __init__(self, name: str, sources: dict[str, DataSource], form: InputFormat, limit: int | None):
        self.name, self.form = name, form
        self.skipped: dict[str, int] = {}
        kinds = _by_kind(sources)
        self.data = Dataset(
            kinds,
            dict.fromkeys(kinds, 1.0),
            form.chat,
            frame_size=form.frame_size,
            max_frames=form.max_frames,
            image_frames=form.image_frames,
        )
        mix, names = self.data.mix, self.data.mix.names
        counts = [self.data.samples[source] for source in names]
        # Sources take turns: the first max(counts) * len(counts) positions have every sample, and repeat some.
        turns = range(max(counts) * len(counts))
        first_epoch = [p for p in turns for source, number in [mix(p)] if number < counts[source]]
        wanted = [kinds[source].kind for source in names]
        positions = [p for p in first_epoch if wanted[mix(p)[0]] in (self.data.kind(p), "preference")]
        self.positions = sorted(sorted(positions, key=_rank)[:limit])
        for position in {mix(p)[0]: p for p in reversed(positions)}.values():  # the first one of each source
            with suppress(SampleError):
                if _on_every_token(self.data.record(position)):
                    raise UserError(
                        f"{name}: its samples are {EVERY_TOKEN}, and an answer's loss is measured: write the set "
                        "without token_ids, or with a loss_mask on the answers alone"
                    )
        # The tokenizer is part of the set, since losses are per token; the prompt order and the frames are not.
        self.tokens = ChatTokenizer(form.chat.tokenizer, "after_frames", "answer", UNCUT).hash
        self.hash = self.hash_without(())

    def __len__(self) -> int:
        return len(self.positions)

    def item(self, number: int) -> EvalItem | str:
        position = self.positions[number]
        samples, issue = self.data.read(position)
        if issue is not None or len(samples) != 1:
            return issue.cause if issue is not None else "a preference pair has no single answer"
        (sample,) = samples
        record, f = self.data.record(position), len(sample.frames)
        if _on_every_token(record):
            return EVERY_TOKEN
        texts = [TokenizedText(sample.tokens, sample.weight, sample.prompt)]
        if not self.form.fits(texts, sample.looks):
            return TOO_LONG
        looks = torch.arange(f) if sample.looks == f else torch.zeros(sample.looks, dtype=torch.int64)
        source = str(record.get("source") or sample.source.partition(SEPARATOR)[0])
        shown = (sample.key, sample.frames, looks, texts)
        return EvalItem(number, sample.key, "", source, self.data.kind(position), *shown)

    def hash_without(self, numbers: Collection[int]) -> str:
        positions = [p for n, p in enumerate(self.positions) if n not in numbers]
        return digest(json.dumps({"of": self.data.identity, "tokens": self.tokens, "positions": positions}))


def _on_every_token(record: dict[str, Any]) -> bool:
    """True for samples whose answers cannot be scored alone. Raises SampleError."""
    masks = [one.get("loss_mask") for one in conversations(record)]
    return any(isinstance(mask, list) and bool(mask) and all(mask) for mask in masks)


def _by_kind(sources: dict[str, DataSource]) -> dict[str, DataSource]:
    """A source for each kind of sample in the shards: shards of an evaluation set hold several."""
    found: dict[str, DataSource] = {}
    for name, source in sources.items():
        indices = open_indices(find_shards(name, source.shards), cache_root(), source.fields)
        for kind in [k for n, k in enumerate(MEDIA) if any((index.media == n).any() for index in indices)]:
            of = "preference" if source.kind == "preference" else kind
            found[f"{name}{SEPARATOR}{kind}"] = source.model_copy(update={"kind": of})
    return found


def _rank(position: int) -> bytes:
    return hashlib.blake2b(str(position).encode(), digest_size=8).digest()


EvalSet = QuestionSet | ShardSet


def open_eval_set(
    spec: str,
    data: Path,
    form: InputFormat,
    val_sources: dict[str, dict[str, Any]],
    limit: int | None = None,
    skip_missing: bool = False,
    log: Log = print,
) -> EvalSet:
    """The set of `NAME` or `NAME=PATH`. `val_sources` are the validation sources of a run. Raises UserError."""
    name, _, path = spec.partition("=")
    if name in READERS:
        return QuestionSet(name, Path(path) if path else data / name, form, limit, skip_missing, log)
    if not path and name == "val" and val_sources and not (data / "val").exists():
        return ShardSet(name, {key: DataSource(**value) for key, value in val_sources.items()}, form, limit)
    places = [path] if path else [str(data / name), str(data / f"{name}.json"), str(data / f"{name}-*.tar")]
    for place in places:
        if path or Path(place).exists() or glob.glob(place):
            return ShardSet(name, {name: DataSource(shards=_pattern(name, place), kind="video")}, form, limit)
    known = [*READERS, *(p.name for p in data.iterdir() if p.is_dir())] if data.is_dir() else list(READERS)
    raise UserError(
        f"no set '{name}'{did_you_mean(name, known)}: there is no {data / name}; name it with {name}=PATH or --data"
    )


def _pattern(name: str, path: str) -> str:
    """The pattern of the shards in a folder, beside a manifest, or as given."""
    where = Path(path)
    if where.name.endswith(".json") and where.is_file():
        where = where.parent
    if where.is_dir():
        for shape in (f"{name}-*.tar", "*.tar"):
            if any(where.glob(shape)):
                return str((where / shape).resolve())
        raise UserError(f"{name}: {where} holds no shards (*.tar){did_you_mean(name, READERS)}")
    return path if "://" in path or path.startswith("/") else str(Path.cwd() / path)
