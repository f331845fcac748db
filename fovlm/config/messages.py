"""An error of pydantic in one line: what is wrong with a value, and the closest valid name or the new one."""

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from fovlm.config import experiments
from fovlm.errors import did_you_mean

Key = tuple[str, ...]

BUDGET = "data.pack_cost (in text tokens; a frame counts as data.frame_cost)"
# What settings were called before 0.2.
RENAMED = {
    "model.dino": "model.encoder",
    "model.prompt": "model.question (before_frames or after_frames)",
    "model.rounds": "model.query_rounds",
    "model.checkpoint_llm": "model.grad_checkpoint: [llm]",
    "model.checkpoint_dino": "model.grad_checkpoint: [encoder]",
    "data.train": "data.mixture",
    "data.frames": BUDGET,
    "data.text": BUDGET,
    "data.pack_frames": BUDGET,
    "data.pack_tokens": BUDGET,
    "data.max_text": "data.max_tokens",
    "data.loss": "data.loss_on",
    "optim.lr_dino": "optim.lr_encoder (null is now optim.freeze: [encoder])",
}
INSTEAD = experiments.RENAMED | {old: f"renamed to {new}" for old, new in RENAMED.items()}

# Null meant a frozen backbone before 0.2.
NULL = {f"optim.lr_{name}": f"null is now optim.freeze: [{name}]" for name in ("encoder", "llm")}


def key_types(section: type[BaseModel], at: Key = ()) -> dict[Key, Any]:
    """Every key path below a model, and its type; `*` stands for a name that the user chooses."""
    found: dict[Key, Any] = {}
    for key, info in section.model_fields.items():
        found[(*at, key)] = info.annotation
        for inner in (info.annotation, *get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                named = get_origin(info.annotation) is dict
                found |= key_types(inner, (*at, key, "*") if named else (*at, key))
    return found


def path_of(error: ErrorDetails, values: Any) -> Key:
    """The key path of an error: pydantic's location without the members of a union, which are not keys."""
    path: list[str] = []
    for part in error["loc"]:
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif path and not isinstance(values, dict | list):
            break
        path.append(str(part))
    return tuple(path)


def explain(error: ErrorDetails, path: Key, types: Mapping[Key, Any], instead: Mapping[str, str]) -> str:
    """What is wrong at `path`. `instead` has messages for unknown keys and for null, by dotted path."""
    known = _starred(path, types)
    kind, given = error["type"], error["input"]
    if kind == "missing":
        return "is missing"
    if kind in ("model_type", "dict_type"):
        return f"must be a mapping of keys, not {given!r}"
    if (kind == "extra_forbidden" or given is None) and (message := instead.get(".".join(path))):
        return message
    if kind == "extra_forbidden":
        beside = [key[-1] for key in types if key[:-1] == known[:-1]]
        elsewhere = [".".join(key) for key in types if key[-1] == known[-1]]
        return "unknown key" + (f" (did you mean '{elsewhere[0]}'?)" if elsewhere else did_you_mean(path[-1], beside))
    words = error.get("ctx", {}).get("expected", "").split("'")[1::2] if kind == "literal_error" else ()
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{message}, not {'null' if given is None else repr(given)}{did_you_mean(str(given), words)}"


def _starred(path: Key, types: Mapping[Key, Any]) -> Key:
    """The path with `*` in place of names that the user chose."""
    known: Key = ()
    for part in path:
        named = any(key[: len(known) + 1] == (*known, "*") for key in types)
        known = (*known, "*" if named else part)
    return known
