"""The tokens of each sample of a shard: tokenized once for a shard and everything that tokenization depends on.

A file in the cache folder: a sealed line of JSON, with the counts by which packs are planned, then the tokens of one
sample after the other. Records without a usable conversation are broken samples, with the cause, like those that the
index found.

    tokens of a sample, i32: for each conversation its length, its tokens before the frames, and its tokens; those
    without weight in the loss are stored as ~token
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer, TokenizedText
from fovlm.data.index import Index
from fovlm.data.sample_format import parse_json
from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest, sealed, unsealed, write_atomically

VERSION = 1  # of the file format and of the meaning of its numbers
COLUMNS = ("texts", "text", "prompt", "at", "crc32")


@dataclass
class TokenCache:
    """Of a shard's n samples, i64 [n] each: conversations, text tokens, and tokens before the frames, of all of them
    together; where their tokens start in `file`, and the checksum of these; and the cause for each broken sample,
    including those of the index."""

    file: Path
    texts: np.ndarray
    text: np.ndarray
    prompt: np.ndarray
    at: np.ndarray
    crc32: np.ndarray
    broken: dict[int, str]


def open_tokens(index: Index, source: DataSource, chat: ChatTokenizer, cache: Path) -> TokenCache:
    """The tokens of a shard, from their file or made now. Raises UserError where they cannot be written."""
    settings = json.dumps([VERSION, index.checksum, chat.hash, source.kind, source.prompt])
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
    return TokenCache(file, **columns, broken={int(row): cause for row, cause in facts["broken"].items()})


def read_texts(file: Path, at: int, texts: int, tokens: int, crc32: int) -> list[TokenizedText] | None:
    """The conversations of one sample; None where the file is not what it was."""
    length = 4 * (2 * texts + tokens)
    try:
        with open(file, "rb") as stored:
            stored.seek(at)
            data = stored.read(length)
    except OSError:
        return None
    if len(data) != length or zlib.crc32(data) != crc32:
        return None
    found, numbers = [], torch.frombuffer(bytearray(data), dtype=torch.int32)
    for _ in range(texts):
        n, prompt = numbers[:2].tolist()
        mine, numbers = numbers[2 : 2 + n], numbers[2 + n :]
        found.append(TokenizedText(torch.where(mine < 0, ~mine, mine).long(), (mine >= 0).float(), prompt))
    return found


def tokenize(index: Index, source: DataSource, chat: ChatTokenizer) -> tuple[dict, list[bytes]]:
    """(the columns and causes of a shard, the tokens of each sample)."""
    rows, broken, samples, at = [], dict(index.broken), [], 0
    with open(index.path, "rb") as file:
        for row in range(len(index)):
            texts: list[TokenizedText] = []
            try:
                if row not in broken:
                    if index.kind(row) != source.kind:
                        raise SampleError(f"a sample of kind {index.kind(row)} in a source of kind {source.kind}")
                    file.seek(int(index.json_offset[row]))
                    record = parse_json(file.read(int(index.json_length[row])))
                    frames = bool(index.frames[row])
                    texts = chat.texts(record, source.prompt, frames, source.kind == "preference")
            except SampleError as error:
                broken[row] = str(error)
            data = b"".join(_stored(text) for text in texts)
            count, prompt = sum(len(text.tokens) for text in texts), sum(text.prompt for text in texts)
            rows.append((len(texts), count, prompt, at, zlib.crc32(data)))
            samples.append(data)
            at += len(data)
    columns = zip(*rows, strict=True) if rows else ((),) * len(COLUMNS)
    return {**dict(zip(COLUMNS, map(list, columns), strict=True)), "broken": broken}, samples


def _stored(text: TokenizedText) -> bytes:
    numbers = torch.where(text.weight > 0, text.tokens, ~text.tokens)
    head = torch.tensor([len(numbers), text.prompt])
    return torch.cat([head, numbers]).to(torch.int32).numpy().tobytes()
