"""The tokens of each conversation of a shard: tokenized once for a shard and everything that tokenization depends on.

A file in the cache folder: a sealed line of JSON, with the counts by which packs are planned, then the tokens of one
conversation after the other. One that cannot be used is broken, with the cause, like the samples that the index found.

    a text, i32: its length, its tokens before the frames, the weight of those in the loss as the bits of a f32, and its
    tokens; those without weight in the loss are stored as ~token
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer, TokenizedText, conversations
from fovlm.data.index import Index
from fovlm.data.record import record_of
from fovlm.data.sample_format import read_members
from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest, sealed, unsealed, write_atomically

VERSION = 3  # of the file format and of the meaning of its numbers
COLUMNS = ("row", "texts", "text", "prompt", "at", "crc32")


@dataclass
class TokenCache:
    """Of a shard's c conversations, sample by sample, i64 [c] each: the sample's row; texts (two for a preference
    pair), their tokens, and those before the frames; where the tokens start in `file`, and the texts' checksums,
    xor-ed; and the cause for each that is broken. A sample that is broken as a whole has one conversation."""

    file: Path
    row: np.ndarray
    texts: np.ndarray
    text: np.ndarray
    prompt: np.ndarray
    at: np.ndarray
    crc32: np.ndarray
    broken: dict[int, str]


def open_tokens(index: Index, source: DataSource, chat: ChatTokenizer, cache: Path) -> TokenCache:
    """The tokens of a shard, from their file or made now. Raises UserError where they cannot be written."""
    settings = json.dumps([VERSION, index.checksum, chat.hash, *source.reading])
    file = cache / "tokens" / f"{digest(settings)}.tokens"
    try:
        with open(file, "rb") as stored:
            line = stored.readline()
        facts = json.loads(unsealed(line))
    except (OSError, ValueError):  # missing or damaged
        facts, tokens = tokenize(index, source, chat)
        line = sealed(json.dumps(facts))
        try:
            write_atomically(file, line + b"".join(tokens))
        except OSError as error:
            raise UserError(
                f"tokens can't be written to {cache} ({error}): set FOVLM_CACHE to a writable folder"
            ) from None
    columns = {name: np.array(facts[name], np.int64) for name in COLUMNS}
    columns["at"] += len(line)
    return TokenCache(file, **columns, broken={int(number): cause for number, cause in facts["broken"].items()})


def read_texts(file: Path, at: int, texts: int, tokens: int, crc32: int) -> list[TokenizedText] | None:
    """So many texts that follow each other; None where the file is not what it was."""
    length = 4 * (3 * texts + tokens)
    try:
        with open(file, "rb") as stored:
            stored.seek(at)
            data = stored.read(length)
    except OSError:
        return None
    parts = []
    for _ in range(texts):
        end = 4 * (3 + int.from_bytes(data[:4], "little"))
        parts.append(data[:end])
        data = data[end:]
    if data or sum(map(len, parts)) != length or _checksum(parts) != crc32:
        return None
    found = []
    for part in parts:
        numbers = np.frombuffer(part, np.int32)
        prompt, scale, mine = int(numbers[1]), numbers[2:3].view(np.float32), numbers[3:]
        ids, weight = np.maximum(mine, ~mine).astype(np.int64), (mine >= 0) * scale  # faster than torch
        found.append(TokenizedText(torch.from_numpy(ids), torch.from_numpy(weight), prompt))
    return found


def tokenize(index: Index, source: DataSource, chat: ChatTokenizer) -> tuple[dict, list[bytes]]:
    """(the columns and causes of a shard's conversations, the tokens of each text)."""
    rows: list[tuple[int, ...]] = []
    broken: dict[int, str] = {}
    stored: list[bytes] = []
    at = 0
    for row, record in _conversations(index, source):
        texts: list[TokenizedText] = []
        try:
            if isinstance(record, SampleError):
                raise record
            texts = chat.texts(record, source.prompt, bool(index.frames[row]), source.kind == "preference")
        except SampleError as error:
            broken[len(rows)] = str(error)
        parts = [_stored(text) for text in texts]
        count, prompt = sum(len(text.tokens) for text in texts), sum(text.prompt for text in texts)
        rows.append((row, len(texts), count, prompt, at, _checksum(parts)))
        stored += parts
        at += sum(map(len, parts))
    columns = zip(*rows, strict=True) if rows else ((),) * len(COLUMNS)
    return {**dict(zip(COLUMNS, map(list, columns), strict=True)), "broken": broken}, stored


def _conversations(index: Index, source: DataSource) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
    """(row, record of a conversation, or why the sample has none) of all samples of a shard."""
    with index.path.open("rb") as file:
        for row in range(len(index)):
            try:
                if row in index.broken:
                    raise SampleError(index.broken[row])
                if index.kind(row) != source.kind and (source.kind != "mixed" or index.preference[row]):
                    raise SampleError(f"a sample of kind {index.kind(row)} in a source of kind {source.kind}")
                file.seek(int(index.record_offset[row]))
                files = read_members(file.read(int(index.record_length[row])))
                for record in conversations(record_of(files, source.fields)):
                    yield row, record
            except SampleError as error:
                yield row, error


def _checksum(parts: list[bytes]) -> int:
    return reduce(xor, map(zlib.crc32, parts), 0)


def _stored(text: TokenizedText) -> bytes:
    numbers = torch.where(text.weight > 0, text.tokens, ~text.tokens)
    head = np.array([len(numbers), text.prompt], np.int32).tobytes() + text.weight.max().numpy().tobytes()
    return head + numbers.to(torch.int32).numpy().tobytes()
