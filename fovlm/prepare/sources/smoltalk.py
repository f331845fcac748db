"""SmolTalk and other chats: `messages` [{role, content}] in parquet or JSONL, and `source` where there is one.

A sample is one question and one answer. `--turns first` (the default) takes a conversation's first exchange: it needs
nothing before it, and is what the language model met most. `--turns each` makes every exchange a sample, with the
exchanges before it folded into its question as a transcript; the chat template never writes such text, so it teaches
the format of a transcript along with the answer. A system message becomes the head of the question, since the chat
format has one system message for all.

`--stage 1|2|3` takes one of three disjoint thirds, told by a hash of the conversation: text retention is wanted in
every stage of training, and no stage should repeat the chats of another.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.job import Job, Made, RawSource

STAGES = 3
TRANSCRIPT = {"user": "User", "assistant": "Assistant"}


def make(row: Row, job: Job) -> Iterator[Made]:
    """The first exchange, or each with those before it; nothing for a conversation of another stage."""
    messages = pick(row, "messages")
    system, exchanges = _exchanges(messages)
    if job.stage and stage_of(messages) != job.stage:
        return
    source = str(row.get("source") or "smoltalk")
    before: list[str] = []
    for user, assistant in exchanges[:1] if job.turns == "first" else exchanges:
        asked = "\n".join([*before, f"{TRANSCRIPT['user']}: {user}"]) if before else user
        yield Made({"user": f"{system}\n\n{asked}" if system else asked, "assistant": assistant, "source": source})
        before += [f"{TRANSCRIPT['user']}: {user}", f"{TRANSCRIPT['assistant']}: {assistant}"]


def stage_of(messages: Any) -> int:
    """1, 2 or 3, from the words of a conversation alone."""
    words = json.dumps([[m.get("role"), m.get("content")] for m in messages if isinstance(m, dict)]).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") % STAGES + 1


def _exchanges(messages: Any) -> tuple[str, list[tuple[str, str]]]:
    """(system message, [(user, assistant)]). Raises BadSample for anything but turns that alternate."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content") or "", str) for m in messages
    ):
        raise SampleError("messages are not a list of {role, content}")
    system, turns = "", [(m.get("role"), (m.get("content") or "").strip()) for m in messages]
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    pairs = list(zip(turns[::2], turns[1::2]))  # a last question without an answer is left out
    if not pairs:
        raise SampleError("no exchange of question and answer")
    if any(user[0] != "user" or assistant[0] != "assistant" for user, assistant in pairs):
        raise SampleError("turns of user and assistant do not alternate")
    return system, [(user[1], assistant[1]) for user, assistant in pairs]


SOURCE = RawSource(
    "smoltalk", "text", ("parquet", "jsonl"), (("messages",),), ("messages", "source"), make, whole="all"
)
