"""The samples of a run by position: position -> source -> shard and row -> bytes -> frames and tokens.

    sizes(start, stop)   frames, looks and tokens of the samples, from index and token counts; nothing is decoded
    read(position)       the sample itself

Both are pure functions of the position, the shards and the settings, on any rank and in any worker. A broken sample is
replaced by the next good one of its source that is no larger than what was planned for it, and reported.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fovlm.config.schema import DataSource, Experiment
from fovlm.data.chat import ChatTokenizer
from fovlm.data.index import MEDIA, Index, index_hash, open_indices
from fovlm.data.packing import PackBudget, PackSize, Sample, SampleIssue
from fovlm.data.sample_format import Member, contents, parse_json, read_members
from fovlm.data.sampling import MixtureSampler, ShardShuffle
from fovlm.data.shards import find_shards
from fovlm.data.token_counts import TokenCounts, open_token_counts
from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest
from fovlm.media import decode
from fovlm.paths import cache_root, data_root, local_folder

SUBSTITUTES = 100  # samples that are considered in place of a broken one
IMAGE = MEDIA.index("image")


def open_dataset(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, weights: dict[str, float]) -> "Dataset":
    """The sources named in `weights` (`data.mixture`, or one of `data.val` with any weight), indexed and counted.

    The first time this reads every shard once. Raises UserError for missing shards, a source without a usable sample,
    and a sample larger than a pack.
    """
    data, model = experiment.data, experiment.model
    chat = ChatTokenizer(tokenizer, model.question, data.loss_on, data.max_tokens)
    dataset = Dataset(
        {name: data.sources[name] for name in weights},
        weights,
        chat,
        frame_size=model.frame_size,
        max_frames=data.max_frames,
        image_frames=data.image_frames,
        seed=data.seed,
    )
    dataset.check_fits(pack_budget(experiment))
    return dataset


def pack_budget(experiment: Experiment) -> PackBudget:
    """The budget of one pack of a run."""
    return PackBudget(experiment.data.pack_cost, experiment.data.frame_cost)


def tokenizer_path(experiment: Experiment) -> str:
    """The tokenizer's folder or hub id: as given, that of the synthetic task, or the language model's own."""
    model, task = experiment.model, experiment.data.generate
    name = model.tokenizer or model.llm
    if isinstance(name, str):
        return str(local_folder(name) or name)
    assert task is not None  # schema.py checks this
    return str(data_root() / task.folder / "tokenizer")


@dataclass
class SourceShards:
    """One source: what its shards hold, and the order in which they are read."""

    name: str
    settings: DataSource
    indices: list[Index]
    counts: list[TokenCounts]
    order: ShardShuffle
    first: np.ndarray  # i64 [shards]: the number of each shard's first sample in the source
    sizes: np.ndarray  # i32 [samples, 4]: frames, looks, text, prompt; of its substitute for a broken sample

    def size(self, shard: int, row: int) -> PackSize:
        return PackSize(*self.sizes[self.first[shard] + row].tolist())

    def following(self, shard: int, row: int) -> Iterator[tuple[int, int]]:
        """The (shard, row) of a sample and then of those behind it in the source, round and round."""
        for number in range(int(self.first[shard]) + row, int(self.first[shard]) + row + 1 + SUBSTITUTES):
            number %= self.order.total
            at = int(np.searchsorted(self.first, number, side="right")) - 1
            while not self.order.rows[at]:  # shards without samples share their first number with the next
                at -= 1
            yield at, number - int(self.first[at])


class Dataset:
    """All samples of a run in its order. Positions count from 0 through all epochs and have no end."""

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
    ):
        self.chat, self.frame_size, self.max_frames, self.image_frames = chat, frame_size, max_frames, image_frames
        self.seed = seed
        self.mix = MixtureSampler(weights)
        self.sources = [self._open(name, sources[name], seed) for name in self.mix.names]
        self.identity = {
            "sources": [[s.name, s.settings.kind, s.settings.prompt, index_hash(s.indices)] for s in self.sources],
            "weights": weights,
        }
        self.hash = _hash(self.identity | {"settings": [chat.hash, max_frames, image_frames, seed]})

    def scored_hash(self, samples: int) -> str:
        """Names the first so many samples as something to score: questions, answers, and the tokens that count.

        How many frames of them a model is shown, and how often, is its own affair: losses compare all the same.
        """
        return _hash(self.identity | {"settings": [self.chat.hash, self.seed, samples]})

    def _open(self, name: str, settings: DataSource, seed: int) -> SourceShards:
        indices = open_indices(find_shards(name, settings.shards), cache_root())
        counts = open_token_counts(indices, settings, self.chat, cache_root())
        rows = [len(index) for index in indices]
        causes = Counter(cause for one in counts for cause in one.broken.values())
        if causes.total() == sum(rows):
            why = causes.most_common(1)[0][0] if causes else "the shards are empty"
            raise UserError(f"data.sources.{name}: no sample of '{settings.shards}' can be used; mostly: {why}")
        first = np.concatenate([[0], np.cumsum(rows)[:-1]])
        sizes = np.concatenate([self._sizes(*both) for both in zip(indices, counts, strict=True)])
        source = SourceShards(name, settings, indices, counts, ShardShuffle(rows, seed, name), first, sizes)
        for shard, one in enumerate(counts):
            for row in one.broken:
                good = (at for at in source.following(shard, row) if at[1] not in counts[at[0]].broken)
                at = next(good, None)
                sizes[first[shard] + row] = sizes[first[at[0]] + at[1]] if at else 0
        return source

    @property
    def samples(self) -> dict[str, int]:
        """How many samples each source has: the length of its epoch."""
        return {source.name: source.order.total for source in self.sources}

    def check_fits(self, budget: PackBudget) -> None:
        """Raise UserError, with its name, for a sample that exceeds the budget of a pack."""
        for source in self.sources:
            costs = budget.of(source.sizes)
            number = int(costs.argmax())
            if costs[number] > budget.cost:
                shard = int(np.searchsorted(source.first, number, side="right")) - 1
                index, row = source.indices[shard], number - int(source.first[shard])
                frames, looks, text, _ = source.sizes[number]
                raise UserError(
                    f"data.sources.{source.name}: sample {index.key[row]} in {index.path.name} has {frames} frames, "
                    f"{looks} looks and {text} text tokens and costs {costs[number]}, more than a pack: raise "
                    f"data.pack_cost={budget.cost}, or lower data.max_frames or data.max_tokens"
                )

    def sizes(self, start: int, stop: int) -> np.ndarray:
        """Frames, looks, text tokens and tokens ahead of the frames i32 [n, 4] of the samples, or their substitutes, at
        the positions from `start` to before `stop`."""
        chosen, numbers = self.mix.window(start, stop)
        sizes = np.zeros((len(chosen), 4), np.int32)
        for which, source in enumerate(self.sources):
            mine = chosen == which
            if mine.any():
                shard, row = source.order.window(int(numbers[mine][0]), int(numbers[mine][-1]) + 1)
                sizes[mine] = source.sizes[source.first[shard] + row]
        return sizes

    def size(self, position: int) -> PackSize:
        """The size of the sample at `position`, or of its substitute."""
        return PackSize(*self.sizes(position, position + 1)[0].tolist())

    def read(self, position: int) -> tuple[list[Sample], SampleIssue | None]:
        """The sample at `position`; two for a preference pair; none when neither it nor a substitute can be used.

        With it comes the report, when the sample at that position itself was broken.
        """
        source, shard, row = self._find(position)
        planned, bad = source.size(shard, row), None
        for at in source.following(shard, row):
            try:
                if cause := source.counts[at[0]].broken.get(at[1]):
                    raise SampleError(cause)
                if source.size(*at).fits(planned):
                    return self._load(source, *at), bad
            except SampleError as error:
                index = source.indices[shard]
                bad = bad or SampleIssue(str(error), source.name, index.path.name, index.key[row])
        return [], bad

    def kind(self, position: int) -> str:
        """What the sample at `position` itself shows: one of MEDIA."""
        source, shard, row = self._find(position)
        return MEDIA[source.indices[shard].media[row]]

    def record(self, position: int) -> dict[str, Any]:
        """The JSON of the sample at `position` itself. Raises SampleError."""
        source, shard, row = self._find(position)
        files = _read_members(source.indices[shard], row)
        return parse_json(next(files[m] for m in files if m.extension == "json"))

    def _find(self, position: int) -> tuple[SourceShards, int, int]:
        """Position -> (source, shard, row)."""
        which, number = self.mix(position)
        source = self.sources[which]
        place = source.order(number)
        return source, place.shard, place.row

    def _sizes(self, index: Index, counts: TokenCounts) -> np.ndarray:
        """The sizes i32 [n, 4] of a shard's samples; a pair has its frames twice."""
        frames = np.minimum(index.frames, self.max_frames)
        looks = np.where(index.media == IMAGE, self.image_frames, frames)
        texts = 1 + index.preference.astype(np.int64)
        return np.stack([texts * frames, texts * looks, counts.text, counts.prompt], axis=1).astype(np.int32)

    def _load(self, source: SourceShards, shard: int, row: int) -> list[Sample]:
        """Read, check, decode and tokenize one sample. Raises SampleError."""
        index = source.indices[shard]
        files = _read_members(index, row)
        kind, pictures = contents(list(files))
        record = parse_json(next(files[m] for m in files if m.extension == "json"))
        texts = self.chat.texts(record, source.settings.prompt, bool(pictures), source.settings.kind == "preference")
        media = [(m.extension.rpartition(".")[2], files[m]) for m in pictures]
        frames = decode.decode_media(media, int(index.frames[row]), self.frame_size, self.max_frames)
        looks = self.image_frames if kind == "image" else len(frames)
        return [
            Sample(
                key=f"{index.path.name}/{index.key[row]}" + (f"#{role}" if role else ""),
                source=source.name,
                frames=frames,
                looks=looks,
                tokens=text.tokens,
                weight=text.weight,
                prompt=text.prompt,
                role=role,
            )
            for text, role in zip(texts, ("chosen", "rejected") if len(texts) == 2 else ("",), strict=True)
        ]


def _hash(identity: dict[str, Any]) -> str:
    return digest(json.dumps(identity))


def _read_members(index: Index, row: int) -> dict[Member, bytes]:
    """The files of one sample, from its byte range alone. Raises SampleError."""
    try:
        with open(index.path, "rb") as shard:
            shard.seek(int(index.offset[row]))
            data = shard.read(int(index.length[row]))
    except OSError as error:
        raise SampleError("unreadable shard") from error
    if len(data) != index.length[row]:
        raise SampleError("truncated tar")
    if zlib.crc32(data) != index.crc32[row]:
        raise SampleError("checksum mismatch")
    return read_members(data)
