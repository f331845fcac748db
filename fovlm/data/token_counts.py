"""How many tokens each sample of a shard has, so that packs are planned without reading pictures.

Made once for a shard and everything that tokenization depends on, and kept in the cache folder. A record without a
usable conversation gets its cause here, beside those that the index found.
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
    """Of a shard's n samples: text tokens i64 [n], those ahead of the frames i64 [n] (both answers of a preference pair
    counted), and the cause for each broken sample, the index's included."""

    text: np.ndarray
    prompt: np.ndarray
    broken: dict[int, str]


def open_token_counts(indices: list[Index], source: DataSource, chat: ChatTokenizer, cache: Path) -> list[TokenCounts]:
    """The lengths of a source's shards, read from their files or made now."""
    return [_open(index, source, chat, cache) for index in track(indices, "counting tokens, shards")]


def _open(index: Index, source: DataSource, chat: ChatTokenizer, cache: Path) -> TokenCounts:
    settings = json.dumps([index.checksum, chat.hash, source.kind, source.prompt])
    file = cache / "lengths" / (digest(settings) + ".json")
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError):  # not there, or half a file of a copied cache
        lengths = _count(index, source, chat)
        stored = {"text": lengths.text.tolist(), "prompt": lengths.prompt.tolist(), "broken": lengths.broken}
        try:
            write_atomically(file, json.dumps(stored))
        except OSError as error:
            raise UserError(
                f"token counts can't be kept in {cache} ({error}): set FOVLM_CACHE to another folder"
            ) from None
        return lengths
    broken = {int(row): cause for row, cause in stored["broken"].items()}
    return TokenCounts(np.array(stored["text"], np.int64), np.array(stored["prompt"], np.int64), broken)


def _count(index: Index, source: DataSource, chat: ChatTokenizer) -> TokenCounts:
    n = len(index)
    lengths = TokenCounts(np.zeros(n, np.int64), np.zeros(n, np.int64), dict(index.broken))
    with open(index.path, "rb") as file:
        for row in range(n):
            if row in lengths.broken:
                continue
            file.seek(int(index.json_offset[row]))
            try:
                if index.kind(row) != source.kind:
                    raise SampleError(f"a sample of kind {index.kind(row)} in a source of kind {source.kind}")
                record = parse_json(file.read(int(index.json_length[row])))
                for text in chat.texts(record, source.prompt, bool(index.frames[row]), source.kind == "preference"):
                    lengths.text[row] += len(text.tokens)
                    lengths.prompt[row] += text.prompt
            except SampleError as error:
                lengths.broken[row] = str(error)
                lengths.text[row] = lengths.prompt[row] = 0
    return lengths
