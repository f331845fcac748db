"""What the general readers share: rows about one file -> one sample with a conversation for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fovlm.data.chat import conversations, turns_of
from fovlm.data.tables import Row
from fovlm.errors import SampleError
from fovlm.prepare.frames import NO_VIDEO, SUFFIXES, bytes_or_name, find_file, picture, video_frames
from fovlm.prepare.job import Job, NewSample, Record


@dataclass
class Conversation:
    """What a row says: a record without `source`, and the files that it is about, (`image` | `video`, which)."""

    record: Record
    files: list[tuple[str, Any]] = field(default_factory=list)


def combine(rows: list[tuple[int, Row | str]], job: Job, read: Callable[[Row, Job], Conversation]) -> NewSample:
    """One sample of all rows that `read` can make conversations of. Raises SampleError when their file is unusable."""
    good: list[tuple[Row, Conversation]] = []
    rejected: list[tuple[int, SampleError]] = []
    for line, row in rows:
        try:
            if isinstance(row, str):
                raise SampleError(row)
            one = read(row, job)
            for record in conversations(one.record):
                turns_of(record, "?" if one.files else "")
            good.append((row, one))
        except SampleError as error:
            rejected.append((line, error))
    if not good:
        return NewSample({}, rejected=rejected)
    pictures, still = media_of(good[0][1].files, job)
    records = [record for _, one in good for record in conversations(one.record)]
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
    return video_frames(find_file(video, job, SUFFIXES, NO_VIDEO) if isinstance(video, str) else video, job), False


def record_of(messages: list[dict[str, Any]]) -> Record:
    """The plainest record of a conversation: `user` and `assistant` when that is all there is, else `messages`."""
    if [m["role"] for m in messages] == ["user", "assistant"]:
        return {"user": messages[0]["content"], "assistant": messages[1]["content"]}
    return {"messages": messages}


def listed(value: Any) -> list[Any]:
    """A column that holds a list, or one or none of its elements."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]
