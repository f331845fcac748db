"""The names of `data.sources.NAME.fields`: where shards that others made have what a record needs.

    fields: {media: mp4, user: json.question, assistant: [json.answer, txt]}

`fovlm/data/record.py` reads them. A place is the extension of a file, which means its text; or that of a JSON file and
keys in it. Of several places the first that has a value counts.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

Field = Literal[
    "media", "text_only", "weight", "user", "assistant", "turns", "messages", "conversations", "chosen", "rejected",
    "token_ids", "loss_mask", "frames_at",
]  # fmt: skip
# The shards of the nanoSmol release. Its token ids do not say where the frames are, so texts come first.
NANOSMOL: dict[str, Any] = {
    "text_only": "json.is_text_only",
    "user": "json.user",
    "chosen": "json.chosen_assistant",
    "rejected": "json.rejected_assistant",
    "assistant": ["json.assistant", "json.caption", "txt"],
    "token_ids": "json.token_ids",
    "loss_mask": "json.loss_mask",
}


def _named(value: Any) -> Any:
    return NANOSMOL if value == "nanosmol" else value


Given = dict[Field, str | list[str]]
Fields = Annotated[Given, BeforeValidator(_named, json_schema_input_type=Given | Literal["nanosmol"])]
