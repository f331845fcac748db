"""Conversations as chat APIs and data sets on Hugging Face have them: `messages` [{role, content}], one a row.

`content` is a text, or a list of parts: {type: text, text}, {type: image, image: FILE}, {type: video, video: FILE},
{type: image_url, image_url: {url: data:...}}; a part without a file means the row's `images` or `videos`. FILE is a
name below --media, {bytes, path}, or bytes. Rows about the same file become one sample with several conversations, and
a conversation keeps all its turns (`--turns first`: the first). `--stage 1|2|3` takes one of three disjoint thirds, by
a hash of the conversation: every training stage needs text, and no stage should repeat the chats of another.

`smoltalk` is the same without files. Sources: the data sets' cards, the documentation of transformers' chat templates.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fovlm.data.chat import turns_of
from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.frames import bytes_or_name, find_video, picture, video_frames
from fovlm.prepare.job import Job, NewSample, RawSource, Record

STAGES = 3
FILES = ("image", "images", "video", "videos")  # columns


@dataclass
class Conversation:
    """What a row says: a record without `source`, and the files that it is about, (`image` | `video`, which)."""

    record: Record
    files: list[tuple[str, Any]] = field(default_factory=list)


def make(row: Row, job: Job) -> Iterator[NewSample]:
    """The conversations of rows about the same file; nothing for a conversation of another stage."""
    rows = [(n, one) for n, one in row["rows"] if not job.stage or isinstance(one, str) or stage_of(one) == job.stage]
    if rows:
        yield combine(rows, job, read)


def combine(rows: list[tuple[int, Row | str]], job: Job, read: Callable[[Row, Job], Conversation]) -> NewSample:
    """One sample of all rows that `read` can make conversations of. Raises SampleError when their file is unusable."""
    good: list[tuple[Row, Conversation]] = []
    rejected: list[tuple[int, SampleError]] = []
    for line, row in rows:
        try:
            if isinstance(row, str):
                raise SampleError(row)
            one = read(row, job)
            _, turns = turns_of(one.record, job.prompt or ("?" if one.files else ""))
            if job.turns == "first" and len(turns) > 1:
                one.record = shortened(one.record)
            good.append((row, one))
        except SampleError as error:
            rejected.append((line, error))
    if not good:
        return NewSample({}, rejected=rejected)
    pictures, still = media_of(good[0][1].files, job)
    records = [one.record for _, one in good]
    record = records[0] if len(records) == 1 else {"conversations": records}
    return NewSample(record | {"source": str(good[0][0].get("source") or job.source)}, pictures, still, rejected)


def media_of(files: list[tuple[str, Any]], job: Job) -> tuple[list[bytes], bool]:
    """(JPEGs, whether they are one picture) of the files of a row. Raises SampleError."""
    if len(files) > 1:
        raise SampleError("several pictures or videos in one row")
    if not files:
        return [], False
    ((kind, which),) = files
    if kind == "image":
        return [picture(which, job)], True
    video = bytes_or_name(which)
    if not video:
        raise SampleError("no video")
    return video_frames(find_video(video, job) if isinstance(video, str) else video, job), False


def read(row: Row, job: Job) -> Conversation:
    """A row with `messages`. Raises SampleError."""
    messages, files = pick(row, "messages"), []
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SampleError("messages are not a list of {role, content}")
    columns = [(name.rstrip("s"), one) for name in FILES for one in listed(row.get(name))]
    rest, said = list(columns), []
    for number, message in enumerate(messages):
        texts = []
        for part in _parts(message.get("content")):
            kind = str(part.get("type") or "text").removesuffix("_url")
            if kind == "text":
                texts.append(str(part.get("text") or ""))
            elif kind in ("image", "video"):
                if number > next((n for n, m in enumerate(messages) if m.get("role") == "user"), 0):
                    raise SampleError("a picture or video in a later turn")
                which = next((part[k] for k in (kind, f"{kind}_url", "path", "url") if part.get(k)), None)
                if which is None and not rest:
                    raise SampleError("fewer files than parts of messages that show one")
                files.append((kind, which) if which is not None else rest.pop(0))
            else:
                raise SampleError("a part of a message that is no text, image or video")
        said.append({"role": message.get("role"), "content": "\n".join(texts).strip()})
    return Conversation(record_of(said), files or columns)


def record_of(messages: list[dict[str, Any]]) -> Record:
    """The plainest record of a conversation: `user` and `assistant` when that is all there is, else `messages`."""
    if [m["role"] for m in messages] == ["user", "assistant"]:
        return {"user": messages[0]["content"], "assistant": messages[1]["content"]}
    return {"messages": messages}


def shortened(record: Record) -> Record:
    """A record with the first turn alone."""
    messages = record["messages"]
    return record_of(messages[: 2 + (messages[0]["role"] == "system")])


def listed(value: Any) -> list[Any]:
    """A column that holds a list, or one or none of its elements."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def stage_of(row: Row) -> int:
    """1, 2 or 3, from the content of a row's conversation."""
    messages = listed(row.get("messages"))
    content = json.dumps([[m.get("role"), m.get("content")] for m in messages if isinstance(m, dict)], default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") % STAGES + 1


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise SampleError("the content of a message is no text and no list of parts")
    return content


SOURCE = RawSource(
    name="messages",
    kind="mixed",
    formats=("parquet", "jsonl", "json"),
    required=(("messages",),),
    columns=("messages", "source", *FILES),
    make=make,
    same=FILES,
    max_bad=0.1,
)
SMOLTALK = RawSource(
    name="smoltalk",
    kind="text",
    formats=("parquet", "jsonl"),
    required=(("messages",),),
    columns=("messages", "source"),
    make=make,
    same=FILES,
    complete="all",
)
