"""All samples of a source in one table: a file that ranks and workers map, so that a node holds it once.

A row is a group: the conversations of a sample that share its encoded frames. Most samples have one conversation, and
so one row; others have as many as `Grouping` divides their conversations into.

It is put together from the indices and tokens of the shards, and again when a shard or a setting has changed, or the
file is damaged: its content has a digest, which is compared whenever a run opens it.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.index import Index, open_index
from fovlm.data.packing import PackBudget, PackSize
from fovlm.data.shard_cache import RemoteShard, Shard
from fovlm.data.token_cache import VERSION, TokenCache, open_tokens
from fovlm.errors import UserError
from fovlm.fileio import digest, digest_file, open_atomically, sealed, unsealed, write_atomically
from fovlm.progress import track

ROW = np.dtype(
    [
        ("offset", "<i8"),  # the byte range of its files in the shard, and the checksum of that
        ("length", "<i8"),
        ("crc32", "<u4"),
        ("media", "u1"),  # a number of MEDIA
        ("media_id", "<i8"),  # the same for the same bytes
        ("frames", "<i4"),  # its pictures, or a video's seconds, before any limit
        ("conversation", "<u2"),  # the number of its first conversation in the sample, and how many the sample has
        ("of", "<u2"),
        ("texts", "<u2"),  # one for each conversation, two for a pair; tokens of all, and those before the frames
        ("text", "<i4"),
        ("prompt", "<i4"),
        ("tokens_at", "<i8"),  # where its tokens start in the shard's token file, and their checksum
        ("tokens_crc32", "<u4"),
        ("cause", "<u2"),  # why it is broken: a number of `causes`; 0 when it is not
    ]
)
AT_ONCE = 64  # indices that are read ahead while others are tokenized; fewer if the cache cannot hold these shards
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grouping:
    """Which conversations over the same frames are read together: neighbours, at most `most`, that a pack holds."""

    most: int
    budget: PackBudget
    max_frames: int

    def first(self, index: Index, tokens: TokenCache) -> np.ndarray:
        """The first conversation i64 [groups] of each group of a shard. Conversations without frames have nothing to
        share, and a broken one is alone, so that it is replaced alone."""
        alone = np.arange(len(tokens.row))
        if len(alone) == len(index):
            return alone
        frames = np.minimum(index.frames, self.max_frames)[tokens.row].tolist()
        first, text = [0], 0
        for number, (row, more) in enumerate(zip(tokens.row.tolist(), tokens.text.tolist(), strict=True)):
            n, f = number - first[-1], frames[number]
            share = n and f and row == tokens.row[number - 1] and not index.preference[row]
            broken = number in tokens.broken or number - 1 in tokens.broken
            holds = self.budget.holds(PackSize(f, 0, text + more, 0, n * f))
            if number and not (share and n < self.most and holds and not broken):
                first.append(number)
                text = 0
            text += more
        return np.array(first)


class SampleTable:
    """The n groups of a source: `rows` ROW [n], shard after shard.

    `shards` and `token_files` are paths, `first` i64 [shards] the number of each one's first group, `counts` [shards]
    how many it has; `hash` names their content. `causes` are those of broken groups, from 1 on; `broken` counts them.
    `several` is True where a sample has several conversations.
    """

    def __init__(self, file: Path, shards: list[Shard], facts: dict[str, Any]):
        self.file, self.facts = file, facts
        self.shards = [
            shard if isinstance(shard, Path) else shard.known_as(checksum)
            for shard, checksum in zip(shards, facts["checksums"], strict=True)
        ]
        self.token_files = [file.parent.with_name("tokens") / name for name in facts["token_files"]]
        self.counts: list[int] = facts["counts"]
        self.ends = np.cumsum(self.counts, dtype=np.int64)
        self.first = self.ends - self.counts
        self.causes: list[str] = ["", *facts["broken"]]
        self.broken = Counter(facts["broken"])
        self.several = any(facts["several"])
        self.hash = digest("\n".join(facts["checksums"]))
        n = sum(self.counts)
        self.rows = np.memmap(file, ROW, "r", shape=n) if n else np.empty(0, ROW)

    def __reduce__(self):
        return SampleTable, (self.file, self.shards, self.facts)  # a worker maps the file, too

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, number: int) -> tuple[int, int]:
        """The shard of a group, and its number there."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - int(self.first[shard])


def open_table(
    shards: list[Shard], source: DataSource, chat: ChatTokenizer, cache: Path, grouping: Grouping | None
) -> SampleTable:
    """The table of a source's shards, from its file or made now; then every new shard is read and tokenized once.

    Without `grouping` every conversation is a group of its own.
    Says in the log what damaged shards lost. Raises UserError for a shard that is not a tar, and a read-only cache.
    """
    stats = [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path in shards for s in [path.stat()]]
    name = digest(json.dumps([VERSION, ROW.descr, stats, chat.hash, *source.reading, grouping and astuple(grouping)]))
    file, header = cache / "samples" / f"{name}.rows", cache / "samples" / f"{name}.json"
    try:
        facts = json.loads(unsealed(header.read_bytes()))
        table = SampleTable(file, shards, facts)
        if digest_file(file) != facts["digest"] or not all(tokens.is_file() for tokens in table.token_files):
            raise ValueError("not the files that the header says")
    except (OSError, ValueError):  # missing or damaged
        try:
            facts = _make(file, shards, source, chat, cache, grouping)
            write_atomically(header, sealed(json.dumps(facts)))
        except OSError as error:
            raise UserError(
                f"no table of samples can be written to {cache} ({error}): set FOVLM_CACHE to a writable folder"
            ) from None
        table = SampleTable(file, shards, facts)
    for warning in facts["warnings"]:
        log.warning(warning)
    return table


def _make(
    file: Path, shards: list[Shard], source: DataSource, chat: ChatTokenizer, cache: Path, grouping: Grouping | None
) -> dict[str, Any]:
    """Write the rows, one shard after the other, and return the facts of the header."""
    facts: dict[str, list] = {name: [] for name in ("checksums", "token_files", "counts", "several", "warnings")}
    broken: Counter[str] = Counter()
    hashed = hashlib.blake2b(digest_size=16)
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    at_once = min([AT_ONCE, *(max(shard.cache.limit // max(shard.file.size, 1), 1) for shard in remote)])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, open_atomically(file) as out:
        some = (shards[start : start + at_once] for start in range(0, len(shards), at_once))
        indices = (
            index for part in some for index in pool.map(lambda shard: open_index(shard, cache, source.fields), part)
        )
        for index in track(indices, "indexing shards", len(shards)):
            tokens = open_tokens(index, source, chat, cache)
            broken.update(tokens.broken.values())
            codes = {cause: code for code, cause in enumerate(broken, start=1)}
            groups = grouping.first(index, tokens) if grouping else np.arange(len(tokens.row))
            rows = _rows(index, tokens, groups, codes)
            hashed.update(data := rows.tobytes())
            out.write(data)
            facts["checksums"].append(index.checksum)
            facts["token_files"].append(tokens.file.name)
            facts["counts"].append(len(rows))
            facts["several"].append(len(tokens.row) > len(index))
            facts["warnings"] += [index.warning] if index.warning else []
    return {**facts, "broken": broken, "digest": hashed.hexdigest()}


def _rows(index: Index, tokens: TokenCache, groups: np.ndarray, codes: dict[str, int]) -> np.ndarray:
    """The rows ROW [groups] of a shard; `groups` are the first conversation of each."""
    rows, row = np.zeros(len(groups), ROW), tokens.row[groups]
    if not len(groups):
        return rows
    for name in ("offset", "length", "crc32", "media", "media_id", "frames"):
        rows[name] = getattr(index, name)[row]
    first = np.searchsorted(tokens.row, row)  # the first conversation of the sample
    rows["conversation"], rows["of"] = groups - first, np.searchsorted(tokens.row, row, side="right") - first
    for name in ("texts", "text", "prompt"):
        rows[name] = np.add.reduceat(getattr(tokens, name), groups)
    rows["tokens_at"], rows["tokens_crc32"] = tokens.at[groups], np.bitwise_xor.reduceat(tokens.crc32, groups)
    for number, cause in tokens.broken.items():
        rows["cause"][np.searchsorted(groups, number)] = codes[cause]  # it is alone in its group
    return rows
