"""The number of tokens of each sample of a shard, so that packs are planned without reading pictures.

Counted once for a shard and everything that tokenization depends on, and stored in the cache folder. Records without a
usable conversation are marked as broken, with the cause, like those that the index found.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.index import Index
from fovlm.data.sample_format import parse_json
from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest, write_atomically
from fovlm.progress import track


@dataclass
class TokenCounts:
    """Of a shard's n samples: text tokens i64 [n], those before the frames i64 [n] (of both answers of a preference
    pair), and the cause for each broken sample, including those of the index."""

    text: np.ndarray
    prompt: np.ndarray
    broken: dict[int, str]


def open_token_counts(indices: list[Index], source: DataSource, chat: ChatTokenizer, cache: Path) -> list[TokenCounts]:
    """The token counts of a source's shards, read from their files or made now."""
    return [_open(index, source, chat, cache) for index in track(indices, "counting tokens, shards")]


def _open(index: Index, source: DataSource, chat: ChatTokenizer, cache: Path) -> TokenCounts:
    settings = json.dumps([index.checksum, chat.hash, source.kind, source.prompt])
    file = cache / "lengths" / (digest(settings) + ".json")
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError):  # missing or damaged
        counts = _count(index, source, chat)
        stored = {"text": counts.text.tolist(), "prompt": counts.prompt.tolist(), "broken": counts.broken}
        try:
            write_atomically(file, json.dumps(stored))
        except OSError as error:
            raise UserError(
                f"token counts can't be written to {cache} ({error}): set FOVLM_CACHE to a writable folder"
            ) from None
        return counts
    broken = {int(row): cause for row, cause in stored["broken"].items()}
    return TokenCounts(np.array(stored["text"], np.int64), np.array(stored["prompt"], np.int64), broken)


def _count(index: Index, source: DataSource, chat: ChatTokenizer) -> TokenCounts:
    n = len(index)
    counts = TokenCounts(np.zeros(n, np.int64), np.zeros(n, np.int64), dict(index.broken))
    with open(index.path, "rb") as file:
        for row in range(n):
            if row in counts.broken:
                continue
            file.seek(int(index.json_offset[row]))
            try:
                if index.kind(row) != source.kind:
                    raise SampleError(f"a sample of kind {index.kind(row)} in a source of kind {source.kind}")
                record = parse_json(file.read(int(index.json_length[row])))
                for text in chat.texts(record, source.prompt, bool(index.frames[row]), source.kind == "preference"):
                    counts.text[row] += len(text.tokens)
                    counts.prompt[row] += text.prompt
            except SampleError as error:
                counts.broken[row] = str(error)
                counts.text[row] = counts.prompt[row] = 0
    return counts
