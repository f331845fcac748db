"""Writes docs/settings.md and experiments/schema.json (for editors) from fovlm/config/schema.py.

    python -m scripts.write_settings

The meaning of a setting is the comment beside it there. tests/test_docs.py holds both files equal to what this writes.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from fovlm.config import schema
from fovlm.config.experiments import SECTIONS
from fovlm.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGE, EDITOR = ROOT / "docs" / "settings.md", ROOT / "experiments" / "schema.json"
FIELD = re.compile(r"^    (\w+): .*  # (.+)$", re.MULTILINE)
INTRO = """# Settings

Every setting with its default and its meaning. In YAML a setting is `section: {key: value}`, on the command line
`section.key=value`. Old names are refused with the new one. `scripts/write_settings.py` writes this page, and
`experiments/schema.json`, with which editors complete and check the files: the line
`# yaml-language-server: $schema=schema.json` at the top of a file in `experiments/` is all that VS Code needs (with its
YAML extension)."""
TYPES = {"object": "mapping", "string": "text", "null": "null", "boolean": "true, false"}
TYPES |= {"integer": "integer", "number": "number"}
BIG = 1 << 48  # a bound that only keeps numbers storable
RUN = "Of the run itself. A file of `experiments/` may have them for all its runs."
# Heading -> class, in the order of the page.
PARTS: dict[str, type[schema.Strict]] = {
    "The run": schema.Experiment, "model": schema.ModelSettings,
    "model.lora": schema.LoraSettings, "data": schema.DataSettings, "data.sources": schema.DataSource,
    "data.generate": schema.SyntheticTask, "optim": schema.OptimSettings, "train": schema.TrainSettings,
    "logger": schema.LoggerSettings,
    "versus": schema.Versus,
}  # fmt: skip


def page() -> str:
    """The text of docs/settings.md."""
    parts = [INTRO]
    for heading, part in PARTS.items():
        about = RUN if part is schema.Experiment else inspect.cleandoc(part.__doc__ or "")
        rows = [("setting", "value", "default", "meaning")]
        listed = part.model_json_schema()
        for name, meaning in meanings(part).items():
            node = listed["properties"][name]
            default = "required" if name in listed.get("required", ()) else f"`{json.dumps(node.get('default'))}`"
            rows.append((f"`{name}`", value_of(node), default, meaning))
        parts += [f"## {heading}", about, markdown_table(rows, left=range(4))]
    return "\n\n".join(parts) + "\n"


def meanings(part: type[schema.Strict]) -> dict[str, str]:
    """Setting -> the comment beside it, of those that are no section of their own."""
    comments = dict(FIELD.findall(inspect.getsource(part)))
    names = [name for name in part.model_fields if name != "name" and not (part is schema.Experiment and name in PARTS)]
    return {name: comments[name] for name in names}


def value_of(node: dict[str, Any]) -> str:
    """What a setting may be, from its JSON schema."""
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(map(value_of, node["anyOf"])))
    if "enum" in node:
        return ", ".join(f"`{word}`" for word in node["enum"])
    bounds = [(">=", "minimum"), (">", "exclusiveMinimum"), ("<=", "maximum"), ("<", "exclusiveMaximum")]
    limits = [f"{sign} {node[key]:g}" for sign, key in bounds if key in node and node[key] < BIG]
    inside = node.get("items", {})
    kind = f"list of {value_of(inside)}" if inside else TYPES[node.get("type", "object")]
    return " ".join([kind, *limits])


def editor_schema() -> dict[str, Any]:
    """JSON schema of a file in `experiments/`: settings, and the keys `base`, `runs` and `grid`."""
    whole = schema.Experiment.model_json_schema()
    nodes = {"Experiment": whole, **whole.pop("$defs")}
    for node in [each for group in nodes.values() for each in group["properties"].values()]:
        node.pop("title", None)
    for part in PARTS.values():
        node = nodes[part.__name__]
        node.pop("required", None)  # a difference has some of the settings
        for name, meaning in meanings(part).items():
            node["properties"][name]["description"] = meaning
    settings = {name: whole["properties"][name] for name in SECTIONS}
    for name in settings.keys() & PARTS.keys():
        settings[name].pop("default", None)
    difference = {"type": "object", "additionalProperties": False, "properties": settings, "required": ["note"]}
    named = {"type": "object", "additionalProperties": {"$ref": "#/$defs/difference"}}
    forms = {
        "base": {"type": "string", "description": "another file, whose settings lie under those of this one"},
        "runs": {**named, "description": "name -> a note of what it asks, and its difference"},
        "grid": {"type": "object", "additionalProperties": named, "description": "crossed axes: axis -> its values"},
    }
    del nodes["Experiment"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Experiments of fovlm",
        "type": "object",
        "additionalProperties": False,
        "properties": {**forms, **settings},
        "$defs": {"difference": difference, **nodes},
    }


def editor_text() -> str:
    """The text of experiments/schema.json."""
    return json.dumps(editor_schema(), indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    EDITOR.write_text(editor_text(), encoding="utf-8")
