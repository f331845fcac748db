"""The record of a sample: its JSON, or in shards of others what the source's `fields` (`config/fields.py`) name.

    fields: {media: mp4, user: json.question, assistant: [json.answer, txt]}

A place is a file's extension, which means its text; or that of a JSON file and keys in it, joined by dots. Of several
places the first with a value counts. Each record has one of FORMS, the first of which there is something.
"""

import re
from typing import Any

from fovlm.data.sample_format import Fields, Member, load_json, parse_json
from fovlm.errors import SampleError

FORMS = (
    ("chosen", "rejected"), ("conversations",), ("messages",), ("turns",), ("assistant",),
    ("token_ids", "loss_mask", "frames_at"),
)  # fmt: skip
MARK = re.compile("<(?:image|video)>")  # where LLaVA's texts have the frames
ROLES = {"human": "user", "gpt": "assistant"}


def record_of(files: dict[Member, bytes], fields: Fields) -> dict[str, Any]:
    """The record in the files of a sample. Raises SampleError."""
    if not fields:
        return parse_json(next(data for member, data in files.items() if member.extension == "json"))
    texts = {member.extension: data for member, data in files.items()}
    opened: dict[str, Any] = {}
    found = {name: _first(_places(fields, name), texts, opened) for name in fields if name != "media"}
    found = {name: value for name, value in found.items() if value is not None and value != "" and value != []}
    form = next((form for form in FORMS if form[0] in found), None)
    if form is None:
        raise SampleError("no answer at the places that `fields` names")
    record = {name: found[name] for name in (*form, "user", "weight", "text_only") if name in found}
    listed = record.get(form[0])
    if isinstance(listed, list) and isinstance(listed[0], dict) and {"from", "role"} & set(listed[0]):
        record["messages"] = messages_of(record.pop(form[0]))
    return record


def record_members(members: list[Member], fields: Fields) -> list[Member]:
    """The files that the record is read from: the JSON, or those that `fields` names."""
    if not fields:
        return [member for member in members if member.extension == "json"]
    places = [place for name in fields if name != "media" for place in _places(fields, name)]
    return [member for member in members if any(_within(place, member.extension) for place in places)]


def messages_of(turns: list[Any]) -> list[dict[str, Any]]:
    """[{role, content}] of those or of LLaVA's [{from, value}], as texts without marks of pictures. Raises
    SampleError."""
    if not all(isinstance(turn, dict) for turn in turns):
        raise SampleError("conversations are not a list of {from, value}")
    said = ((turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns)
    return [{"role": ROLES.get(str(role), role), "content": _text(content)} for role, content in said]


def _text(content: Any) -> str:
    """The text of a message, which may come in typed parts, with a line break in place of a mark and the space around
    it."""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "\n".join(part.strip() for part in MARK.split(content)).strip() if isinstance(content, str) else ""


def _places(fields: Fields, name: str) -> list[str]:
    return [fields[name]] if isinstance(fields[name], str) else fields[name]


def _within(place: str, extension: str) -> bool:
    """True when the place is the file of this extension, or in it."""
    return place == extension or place.startswith(extension + ".")


def _first(places: list[str], files: dict[str, bytes], opened: dict[str, Any]) -> Any:
    """The first value at these places; None when there is none. `opened` holds what JSON files say. Raises
    SampleError."""
    for place in places:
        extension = max((name for name in files if _within(place, name)), key=len, default=None)
        if extension is None:
            continue
        if extension not in opened:
            opened[extension] = _open(extension, files[extension])
        value = opened[extension]
        for key in place[len(extension) + 1 :].split(".") if place != extension else ():
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value != "":
            return value
    return None


def _open(extension: str, data: bytes) -> Any:
    """What a file holds: JSON, or text."""
    if extension.endswith("json"):
        return load_json(data)
    try:
        return data.decode("utf-8-sig").strip()
    except ValueError as error:
        raise SampleError("text is not Unicode") from error
