"""SmolTalk and other chats: `messages` [{role, content}] in parquet or JSONL, and optionally `source`.

A sample is one question and one answer. `--turns first` (the default) takes the first exchange of a conversation, which
needs no context and is what the language model saw most. `--turns each` makes every exchange a sample and puts the
earlier ones into its question as a transcript; the chat template never writes such text, so training also teaches that
format. A system message becomes the start of the question, because the chat format has one system message for all.

`--stage 1|2|3` takes one of three disjoint thirds, by a hash of the conversation: every training stage needs text, and
no stage should repeat the chats of another.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.job import Job, NewSample, RawSource

STAGES = 3


def make(row: Row, job: Job) -> Iterator[NewSample]:
    """The first exchange, or each with those before it; nothing for a conversation of another stage."""
    messages = pick(row, "messages")
    system, exchanges = _exchanges(messages)
    if job.stage and stage_of(messages) != job.stage:
        return
    source = str(row.get("source") or "smoltalk")
    transcript: list[str] = []
    for user, assistant in exchanges[:1] if job.turns == "first" else exchanges:
        question = "\n".join([*transcript, f"User: {user}"]) if transcript else user
        question = f"{system}\n\n{question}" if system else question
        yield NewSample({"user": question, "assistant": assistant, "source": source})
        transcript += [f"User: {user}", f"Assistant: {assistant}"]


def stage_of(messages: Any) -> int:
    """1, 2 or 3, from the content of a conversation."""
    content = json.dumps([[m.get("role"), m.get("content")] for m in messages if isinstance(m, dict)]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") % STAGES + 1


def _exchanges(messages: Any) -> tuple[str, list[tuple[str, str]]]:
    """(system message, [(user, assistant)]). Raises SampleError unless the turns alternate."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content") or "", str) for m in messages
    ):
        raise SampleError("messages are not a list of {role, content}")
    system, turns = "", [(m.get("role"), (m.get("content") or "").strip()) for m in messages]
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    pairs = list(zip(turns[::2], turns[1::2]))  # drops a last question without an answer
    if not pairs:
        raise SampleError("no exchange of question and answer")
    if any(user[0] != "user" or assistant[0] != "assistant" for user, assistant in pairs):
        raise SampleError("turns of user and assistant do not alternate")
    return system, [(user[1], assistant[1]) for user, assistant in pairs]


SOURCE = RawSource(
    name="smoltalk",
    kind="text",
    formats=("parquet", "jsonl"),
    required=(("messages",),),
    columns=("messages", "source"),
    make=make,
    complete="all",
)
