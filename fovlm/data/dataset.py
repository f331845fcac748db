"""The samples of a run by position: position -> source -> row of its table -> bytes -> frames and tokens.

    sizes(start, stop)   frames, looks and tokens of the groups, from the table; nothing is decoded
    read(position)       the group itself: one or more conversations over the same frames (`sample_table.py`)

Both are pure functions of the position, the shards and the settings, on any rank and in any worker. A broken group is
replaced by the next good one of its source that is no larger than what was planned for it, and reported.
"""

import json
import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.utils.data
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fovlm.config.schema import DataSource, Experiment
from fovlm.data.chat import ChatTokenizer, TokenizedText, conversations
from fovlm.data.index import MEDIA, stored_indices
from fovlm.data.packing import PackBudget, PackSize, Sample, SampleIssue
from fovlm.data.record import record_of
from fovlm.data.sample_format import Member, contents, read_members
from fovlm.data.sample_table import ROW, Grouping, SampleTable, open_table
from fovlm.data.sampling import MixtureSampler, ShardShuffle
from fovlm.data.shard_cache import RemoteShard, ShardCache, shard_cache
from fovlm.data.shards import find_shards
from fovlm.data.token_cache import read_texts
from fovlm.data.workers import DECODING, MEMORY, bounded_memory
from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest
from fovlm.media import decode
from fovlm.paths import cache_root

SUBSTITUTES = 100  # samples that are considered in place of a broken one
AT_ONCE = 1 << 18  # samples whose sizes are computed together
IMAGE = MEDIA.index("image")


def open_dataset(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, weights: dict[str, float], weigh: bool = False
) -> "Dataset":
    """The sources named in `weights` (`data.mixture`, or one of `data.val` with any weight), indexed and counted.

    The first time this reads every shard once. `weigh` is for training: it begins with `data.first`, and applies
    `loss_weight` and `data.length_weight` to the tokens; validation counts all tokens alike. Raises UserError for
    missing shards, a source without a usable sample, and a sample larger than a pack.
    """
    data, model = experiment.data, experiment.model
    chat = ChatTokenizer(tokenizer, model.question, data.loss_on, data.max_tokens)
    budget = pack_budget(experiment)
    dataset = Dataset(
        {name: data.sources[name] for name in weights},
        weights,
        chat,
        frame_size=model.frame_size,
        max_frames=data.max_frames,
        image_frames=data.image_frames,
        seed=data.seed,
        grouping=Grouping(data.questions_per_encoding, budget, data.max_frames),
        length_weight=data.length_weight if weigh else None,
        first=data.first if weigh else None,
        cache=shard_cache(data),
    )
    dataset.check_fits(budget)
    return dataset


def pack_budget(experiment: Experiment) -> PackBudget:
    """The budget of one pack of a run."""
    return PackBudget(experiment.data.pack_cost, experiment.data.frame_cost)


@dataclass
class SourceShards:
    """One source: what its shards hold, and the order in which their groups are read."""

    name: str
    settings: DataSource
    table: SampleTable
    order: ShardShuffle

    @property
    def remote(self) -> list[RemoteShard]:
        """Its remote shards."""
        return [shard for shard in self.table.shards if isinstance(shard, RemoteShard)]

    def following(self, number: int) -> Iterator[int]:
        """A group's number in the table and then those of the groups behind it, round and round."""
        return (n % len(self.table) for n in range(number, number + 1 + SUBSTITUTES))

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """The numbers i64 [n] in the table of the source's groups from `start` to before `stop`, in their order."""
        shard, row = self.order.window(start, stop)
        return self.table.first[shard] + row

    def planned(self, numbers: np.ndarray) -> np.ndarray:
        """The rows ROW [n] of groups, each broken one's that of its substitute; zeros where there is none."""
        rows = self.table.rows[numbers]
        for i in np.flatnonzero(rows["cause"]).tolist():
            others = self.table.rows[list(self.following(int(numbers[i])))]
            good = others[others["cause"] == 0]
            rows[i] = good[0] if len(good) else np.zeros((), ROW)
        return rows


class Dataset:
    """All samples of a run in its order. Positions count from 0 through all epochs and have no end.

    With `length_weight` tokens have the weights of training; without it (None) those with a loss have weight 1.
    """

    def __init__(
        self,
        sources: dict[str, DataSource],
        weights: dict[str, float],
        chat: ChatTokenizer,
        *,
        frame_size: int,
        max_frames: int = 64,
        image_frames: int = 1,
        seed: int = 0,
        grouping: Grouping | None = None,
        length_weight: str | None = None,
        first: dict[str, int] | None = None,
        cache: ShardCache | None = None,
    ):
        self.chat, self.frame_size, self.max_frames, self.image_frames = chat, frame_size, max_frames, image_frames
        self.seed, self.grouping, self.length_weight = seed, grouping, length_weight
        self.mix = MixtureSampler(weights, first)
        self.sources = [self._open(name, sources[name], seed, cache) for name in self.mix.names]
        self.remote = any(source.remote for source in self.sources)
        self.identity: dict[str, Any] = {
            "sources": [[s.name, *s.settings.reading, s.table.hash] for s in self.sources],
            "weights": weights,
        }
        if first:
            self.identity["first"] = first
        if any(source.table.several for source in self.sources):
            self.identity["grouping"] = grouping and asdict(grouping)
        self.hash = digest(json.dumps(self.identity | {"settings": [chat.hash, max_frames, image_frames, seed]}))

    def scored_hash(self, samples: int) -> str:
        """Names the first so many samples as something to score: questions, answers, and the tokens that count.

        How many frames of them a model is shown, and how often, is its own affair: losses compare all the same.
        """
        return digest(json.dumps(self.identity | {"settings": [self.chat.hash, self.seed, samples]}))

    def _open(self, name: str, settings: DataSource, seed: int, cache: ShardCache | None) -> SourceShards:
        shards = find_shards(name, settings.shards, cache)
        table = open_table(shards, settings, self.chat, cache_root(), self.grouping)
        if table.broken.total() == len(table):
            why = table.broken.most_common(1)[0][0] if len(table) else "the shards are empty"
            raise UserError(f"data.sources.{name}: no sample of '{settings.shards}' can be used; mostly: {why}")
        return SourceShards(name, settings, table, ShardShuffle(table.counts, seed, name))

    @property
    def samples(self) -> dict[str, int]:
        """How many groups each source has: the length of its epoch."""
        return {source.name: source.order.total for source in self.sources}

    def check_fits(self, budget: PackBudget) -> None:
        """Raise UserError, with its name, for a sample that exceeds the budget of a pack."""
        for source in self.sources:
            for start in range(0, len(source.table), AT_ONCE):
                rows = source.table.rows[start : start + AT_ONCE]
                costs = budget.of(self._sizes(source, rows)) * (rows["cause"] == 0)
                if costs.max() > budget.cost:
                    number = start + int(costs.argmax())
                    ((frames, looks, text, *_),) = self._sizes(source, source.table.rows[number : number + 1])
                    shard, key = self._name(source, number)
                    raise UserError(
                        f"data.sources.{source.name}: sample {key} in {shard} has {frames} frames, {looks} looks and "
                        f"{text} text tokens and costs {costs.max()}, more than a pack: raise "
                        f"data.pack_cost={budget.cost}, or lower data.max_frames or data.max_tokens"
                    )

    def sizes(self, start: int, stop: int) -> np.ndarray:
        """The parts of a PackSize i32 [n, 5] of the groups, or their substitutes, from position `start` to before
        `stop`."""
        chosen, numbers = self.mix.window(start, stop)
        sizes = np.zeros((len(chosen), 5), np.int32)
        for which, source in enumerate(self.sources):
            mine = chosen == which
            if mine.any():
                order = source.numbers(int(numbers[mine][0]), int(numbers[mine][-1]) + 1)
                sizes[mine] = self._sizes(source, source.planned(order))
        return sizes

    def size(self, position: int) -> PackSize:
        """The size of the group at `position`, or of its substitute."""
        return PackSize(*self.sizes(position, position + 1)[0].tolist())

    def read(self, position: int) -> tuple[list[Sample], SampleIssue | None]:
        """The samples at `position`: one for each conversation of the group, two for a preference pair; none when
        neither the group nor a substitute can be used.

        With them comes the report, when the group at that position itself was broken.
        """
        source, number = self._find(position)
        planned, bad = self.size(position), None
        for at in source.following(number):
            row = source.table.rows[at]
            try:
                if row["cause"]:
                    raise SampleError(source.table.causes[row["cause"]])
                if PackSize(*self._sizes(source, row[None])[0].tolist()).fits(planned):
                    in_worker = torch.utils.data.get_worker_info()
                    with bounded_memory(max(MEMORY, 2 * int(row["length"]) + DECODING)) if in_worker else nullcontext():
                        return self._load(source, at), bad
            except (SampleError, MemoryError) as error:
                cause = str(error) if isinstance(error, SampleError) else "takes too much memory"
                bad = bad or SampleIssue(cause, source.name, *self._name(source, number))
        return [], bad

    def kind(self, position: int) -> str:
        """What the sample at `position` itself shows: one of MEDIA."""
        source, number = self._find(position)
        return MEDIA[source.table.rows[number]["media"]]

    def record(self, position: int) -> dict[str, Any]:
        """The JSON of the sample at `position` itself. Raises SampleError."""
        source, number = self._find(position)
        return record_of(_read_files(source, number)[1], source.settings.fields)

    def hold(self, positions: list[int]) -> ExitStack:
        """Keep the remote shards of these samples in the cache, where they are fetched, until the end of a block."""
        with ExitStack() as stack:
            places = [self._find(position) for position in positions if self.remote]
            for shard in {source.table.shards[source.table.place(number)[0]] for source, number in places}:
                if isinstance(shard, RemoteShard):
                    stack.enter_context(shard.open())
            return stack.pop_all()

    def _find(self, position: int) -> tuple[SourceShards, int]:
        """Position -> (source, number of the group in its table)."""
        which, number = self.mix(position)
        return self.sources[which], int(self.sources[which].numbers(number, number + 1)[0])

    def _name(self, source: SourceShards, number: int) -> tuple[str, str]:
        """(shard, key) of a sample, which may be unreadable: the key is that in the index."""
        shard, place = source.table.place(number)
        path = source.table.shards[shard]
        if index := next(stored_indices(path, cache_root(), source.settings.fields), None):
            row = int(np.searchsorted(index.offset, source.table.rows[number]["offset"]))
            if row < len(index):
                return path.name, index.key[row]
        return path.name, f"number {place}"

    def _sizes(self, source: SourceShards, rows: np.ndarray) -> np.ndarray:
        """The sizes i32 [n, 5] of groups ROW [n]. Conversations share the frames; each text of a pair has its own."""
        frames = np.minimum(rows["frames"], self.max_frames)
        looks = np.where(rows["media"] == IMAGE, self.image_frames, frames)
        texts = rows["texts"].astype(np.int32)
        own = texts if source.settings.kind == "preference" else np.minimum(texts, 1)
        parts = [own * frames, texts * looks, rows["text"], rows["prompt"], (texts - own) * frames]
        return np.stack(parts, axis=1).astype(np.int32)

    def _load(self, source: SourceShards, number: int) -> list[Sample]:
        """Read, check, decode and tokenize one group. Raises SampleError."""
        shard, files = _read_files(source, number)
        row = source.table.rows[number]
        kind = MEDIA[row["media"]]
        pictures = contents(list(files), source.settings.fields)[1] if kind != "text" else []
        media = [(m.extension.rpartition(".")[2], files[m]) for m in pictures]
        frames = decode.decode_media(media, int(row["frames"]), self.frame_size, self.max_frames)
        pair = source.settings.kind == "preference"
        samples = []
        for i, text in enumerate(self._texts(source, number, files)):
            role = ("chosen", "rejected")[i] if pair else ""
            name = role or (str(row["conversation"] + i) if row["of"] > 1 else "")
            samples.append(
                Sample(
                    key=f"{shard}/{next(iter(files)).key}" + (f"#{name}" if name else ""),
                    source=source.name,
                    frames=frames,
                    looks=self.image_frames if kind == "image" else len(frames),
                    tokens=text.tokens,
                    weight=self._weigh(text.weight, source.settings.loss_weight),
                    prompt=text.prompt,
                    role=role,
                    shares=i > 0 and not pair,
                )
            )
        return samples

    def _texts(self, source: SourceShards, number: int, files: dict[Member, bytes]) -> list[TokenizedText]:
        """The texts of a group, from the cache; tokenized again where that was damaged since. Raises SampleError."""
        table = source.table
        row, file = table.rows[number], table.token_files[table.place(number)[0]]
        facts = (int(row[name]) for name in ("tokens_at", "texts", "text", "tokens_crc32"))
        if (texts := read_texts(file, *facts)) is not None:
            return texts
        pair, first = source.settings.kind == "preference", int(row["conversation"])
        records = conversations(record_of(files, source.settings.fields))[
            first : first + (1 if pair else int(row["texts"]))
        ]
        question, shown = source.settings.prompt, bool(row["frames"])
        return [text for record in records for text in self.chat.texts(record, question, shown, pair)]

    def _weigh(self, weight: Tensor, of_source: float) -> Tensor:
        """The weights [s] in the loss of training, from those of the tokens that have a loss."""
        if self.length_weight is None:
            return (weight > 0).float()
        return weight * (of_source / (math.sqrt((weight > 0).sum()) if self.length_weight == "sqrt" else 1))


def _read_files(source: SourceShards, number: int) -> tuple[str, dict[Member, bytes]]:
    """(the shard's name, the files) of a group's sample, from its byte range alone. Raises SampleError."""
    row, path = source.table.rows[number], source.table.shards[source.table.place(number)[0]]
    try:
        with path.open("rb") as shard:
            shard.seek(int(row["offset"]))
            data = shard.read(int(row["length"]))
    except OSError as error:
        raise SampleError("unreadable shard") from error
    if len(data) != row["length"]:
        raise SampleError("truncated tar")
    if zlib.crc32(data) != row["crc32"]:
        raise SampleError("checksum mismatch")
    return path.name, read_members(data)
