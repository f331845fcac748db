"""Conversations as chat APIs and data sets on Hugging Face have them: `messages` [{role, content}], one a row.

`content` is a text, or a list of parts: {type: text, text}, {type: image, image: FILE}, {type: video, video: FILE},
{type: image_url, image_url: {url: data:...}}; a part without a file means the row's `images` or `videos`. FILE is a
name below --media, {bytes, path}, or bytes. Rows about the same file become one sample with several conversations, and
a conversation keeps all its turns. `--stage 1|2|3` takes one of three disjoint thirds, by
a hash of the conversation: every training stage needs text, and no stage should repeat the chats of another.

`smoltalk` is the same without files. Sources: the data sets' cards, the documentation of transformers' chat templates.
"""

import hashlib
import json
from typing import Any

from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.conversations import Conversation, combine, listed, record_of
from fovlm.prepare.job import Job, NewSample, RawSource

STAGES = 3
FILES = ("image", "images", "video", "videos")  # columns


def make(row: Row, job: Job) -> NewSample:
    """The conversations of rows about the same file; nothing for a conversation of another stage."""
    rows = [(n, one) for n, one in row["rows"] if not job.stage or isinstance(one, str) or stage_of(one) == job.stage]
    return combine(rows, job, read)


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
    if files and rest and len(rest) < len(columns):
        raise SampleError("more files than parts of messages that show one")
    return Conversation(record_of(said), files or columns)


def stage_of(row: Row) -> int:
    """1, 2 or 3, from the content of a row's conversation."""
    messages = listed(row.get("messages"))
    content = json.dumps([[m.get("role"), m.get("content")] for m in messages if isinstance(m, dict)], default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") % STAGES + 1


def _parts(content: Any) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
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
