"""The format of a sample: consecutive tar members whose names are equal up to the first dot of the base name.

This is WebDataset's rule. The rest of the name is the *extension*: `json` is the record; `jpg`, `png`, `webp` a
picture; `000.jpg`, `001.jpg` ... the frames of a video; `mp4`, `webm`, `mkv` a video. Everything else is ignored: it is
never opened or unpickled.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from fovlm.errors import SampleError
from fovlm.media import decode

NUMBERED = re.compile(r"(\d+)\.(\w+)")


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
        return self.offset + -(-self.length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def split_name(name: str) -> tuple[str, str]:
    """`folder/clip.003.JPG` -> (`folder/clip`, `003.jpg`): WebDataset's rule."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def list_members(tar: tarfile.TarFile) -> Iterator[Member]:
    """The regular files of an open tar. Links, devices and folders are ignored."""
    for info in tar:
        if info.isreg():
            yield Member(*split_name(info.name), info.offset, info.offset_data, info.size)


def read_members(data: bytes) -> dict[Member, bytes]:
    """The files of one sample from its byte range."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {member: data[member.offset : member.offset + member.length] for member in list_members(tar)}


def contents(members: list[Member]) -> tuple[str, list[Member]]:
    """(`text` | `image` | `video`, the media members in frame order) of a sample's members. Raises SampleError."""
    numbered: list[Member] = []
    single: list[Member] = []
    for member in members:
        extension = member.extension
        if match := NUMBERED.fullmatch(extension):
            if match[2] in decode.PICTURES:
                numbered.append(member)
        elif extension in decode.PICTURES or extension in decode.VIDEOS:
            single.append(member)
    if sum(m.extension == "json" for m in members) != 1:
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


def parse_json(data: bytes) -> dict:
    """A sample's record. Raises SampleError."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("malformed JSON") from error
    if not isinstance(record, dict):
        raise SampleError("malformed JSON")
    return record
