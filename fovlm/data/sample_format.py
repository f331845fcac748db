"""The format of a sample: consecutive tar members whose names are equal up to the first dot of the base name.

This is WebDataset's rule. The rest of the name is the *extension*: `json` is the record; `jpg`, `png`, `webp` a
picture; `000.jpg`, `001.jpg` ... the frames of a video; `mp4`, `webm`, `mkv` a video. Everything else is ignored: it is
never opened or unpickled.

Tars come from strangers, so their headers are read here: Python's `tarfile` never ends on a negative size, and
reads extended headers of any length into memory. Plain files in ustar, GNU and pax archives are all that is needed.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

from fovlm.errors import SampleError
from fovlm.media import decode

NUMBERED = re.compile(r"(\d{1,18})\.(\w+)")
BLOCK = 512  # tars consist of blocks of so many bytes
MAX_NAME = 1 << 16  # bytes of an extended header, which holds the name of the next file
MAX_JSON = 8 << 20  # bytes of a record; parsed, JSON can take 30 times its size
Fields = Mapping[Any, Any]  # `data.sources.NAME.fields` (`record.py`)
OWN: Fields = MappingProxyType({})  # none: a sample has a JSON that is its record
PLAIN, NO_DATA = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")  # kinds of headers


@dataclass(frozen=True)
class Member:
    """One file of a sample: `start` is its header's offset in the tar, `offset` that of its bytes."""

    key: str
    extension: str
    start: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + padded(self.length)


class TarError(ValueError):
    """A tar that cannot be read from byte `at` on."""

    def __init__(self, at: int):
        super().__init__(f"damaged from byte {at} on")
        self.at = at


def padded(length: int) -> int:
    """The bytes that a file of this length takes in a tar."""
    return -(-length // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str]:
    """`folder/clip.003.JPG` -> (`folder/clip`, `003.jpg`): WebDataset's rule."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def list_members(tar: BinaryIO, size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes, up to its end mark. Links, devices and folders are ignored.

    Names are made printable. Raises TarError where the end mark is missing or a header is damaged, after the file that
    the damage cuts.
    """
    at = start = 0
    extended: dict[str, bytes] = {}  # what extended headers say about the next file
    while True:
        tar.seek(at)
        header = tar.read(BLOCK)
        if header == bytes(BLOCK):
            return
        try:
            kind, name, length = _parse_header(header)
            if kind in (b"x", b"g", b"L", b"K"):
                if not 0 <= length <= MAX_NAME or at - start > 4 * MAX_NAME:  # one of each kind
                    raise ValueError("an absurd extended header")
                data = tar.read(length)
                if kind == b"x":
                    extended |= _pax_records(data)
                elif kind == b"L":
                    extended["path"] = data.partition(b"\0")[0]
                at += BLOCK + padded(length)
                continue
            name, length = extended.get("path", name), int(extended.get("size", length))
            if length < 0 or kind == b"S" or any(key.startswith("GNU.sparse") for key in extended):
                raise ValueError("a negative size or a sparse file")
        except ValueError:
            raise TarError(at) from None
        folder = kind in NO_DATA or (kind == b"\0" and name.endswith(b"/"))
        after = at + BLOCK + (0 if folder else padded(length))
        if kind in PLAIN and not folder:
            text = printable(name.decode("utf-8", "backslashreplace"))
            yield Member(*split_name(text), start, at + BLOCK, min(length, size - at - BLOCK))
        if after > size:
            raise TarError(at)
        at = start = after
        extended = {}


def _parse_header(header: bytes) -> tuple[bytes, bytes, int]:
    """(kind, name, length) of a block. Raises ValueError."""
    if len(header) < BLOCK or sum(header) - sum(header[148:156]) + 8 * ord(" ") != _number(header[148:156]):
        raise ValueError("no header")
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return header[156:157], name, _number(header[124:136])


def _number(field: bytes) -> int:
    """Octal digits; or, after a byte above 127, as GNU tar writes large numbers. Raises ValueError."""
    if field[0] > 127:
        return int.from_bytes(field, "big", signed=True) if field[0] == 255 else int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _pax_records(data: bytes) -> dict[str, bytes]:
    """The records `LENGTH KEY=VALUE` of a pax header that matter here. Raises ValueError."""
    records, at = {}, 0
    while at < len(data):
        length = data[at : at + 20].partition(b" ")[0]
        if not len(length) + 2 < int(length) <= len(data) - at:
            raise ValueError("no pax record")
        key, _, value = data[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            records[key.decode()] = value
        at += int(length)
    return records


def printable(text: str) -> str:
    """The text with escapes for what a terminal would not print as it is: control characters, line breaks, marks."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_members(data: bytes) -> dict[Member, bytes]:
    """The files of one sample from its byte range. Raises SampleError."""
    try:
        members = list(list_members(io.BytesIO(data + bytes(BLOCK)), len(data)))
    except TarError as error:
        raise SampleError("truncated tar") from error
    return {member: data[member.offset : member.offset + member.length] for member in members}


def contents(members: list[Member], fields: Fields = OWN) -> tuple[str, list[Member]]:
    """(`text` | `image` | `video`, the media members in frame order) of a sample's members; `fields` as of its source.
    Raises SampleError."""
    numbered: list[Member] = []
    single: list[Member] = []
    for member in members:
        extension = member.extension
        match = NUMBERED.fullmatch(extension)
        if fields.get("media", extension) not in (extension, match and match[2]):
            continue
        if match:
            if match[2] in decode.PICTURES:
                numbered.append(member)
        elif extension in decode.PICTURES or extension in decode.VIDEOS:
            single.append(member)
    if not fields and sum(m.extension == "json" for m in members) != 1:
        raise SampleError("no JSON" if all(m.extension != "json" for m in members) else "more than one JSON")
    if len(single) + bool(numbered) > 1:
        raise SampleError("more than one picture or video")
    if numbered:
        frames = {int(m.extension.partition(".")[0]): m for m in numbered}
        if len(frames) < len(numbered):
            raise SampleError("two pictures with the same number")
        return "video", [frames[number] for number in sorted(frames)]
    if single:
        return "video" if single[0].extension in decode.VIDEOS else "image", single
    return "text", []


def load_json(data: bytes) -> Any:
    """What a JSON file of a sample holds. Raises SampleError."""
    if len(data) > MAX_JSON:
        raise SampleError(f"JSON of more than {MAX_JSON >> 20} MB")
    try:
        return json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SampleError("malformed JSON") from error


def parse_json(data: bytes) -> dict[str, Any]:
    """A sample's record. Raises SampleError."""
    if not isinstance(record := load_json(data), dict):
        raise SampleError("malformed JSON")
    return record
