"""All runs by name, and the settings that `experiments/*.yaml` give them: plain YAML, no torch, fields unchecked.

A file holds settings (`model:`, `data:`, `optim:`, `train:`, `logger:`, `deepspeed:` ...) and up to three more keys:

    base: other.yaml        settings of another file (relative to this one), under this file's own
    runs: {NAME: {note: what it asks, optim: {...}}}                          a name -> its difference
    grid: {size: {135M: {...}, 360M: {...}}, budget: {C1: {...}}}             crossed axes: 135M-C1, 360M-C1

A difference is merged key by key, except for the settings in `WHOLE`, which are replaced, and those in `ONE_OF`, which
replace each other. Every value keeps its origin, so that an error can name the file and key where it was written.
"""

import functools
import itertools
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fovlm.errors import UserError, did_you_mean
from fovlm.paths import ROOT, SHIPPED
from fovlm.paths import in_project as _short

# An installed package adds its own, of which a file of the same name here takes the place.
EXPERIMENTS = ROOT / "experiments"
SECTIONS = ("note", "seeds", "versus", "deepspeed", "model", "data", "optim", "train", "logger")
FORMS = ("base", "runs", "grid")
RENAMED = {"journal": "renamed to logger", "engine": "renamed to deepspeed"}
# A mixture or a model is written in one place.
WHOLE = {("data", "mixture"), ("data", "first"), ("model", "llm"), ("model", "encoder")}
ONE_OF: dict[tuple[str, ...], set[str]] = {("train",): {"samples", "steps", "flops"}}
MOST, DEEPEST = 100_000, 50  # values in a YAML text or runs in a grid, and nested levels: more is a mistake or a trap

Key = tuple[str, ...]
Run = tuple[Path, list[tuple[str, dict[str, Any]]], str]  # file, (where, difference) in order, note


@dataclass
class Settings:
    """Merged values, and where each was written: key path -> `file: where.`, to be followed by the key."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[Key, str] = field(default_factory=dict)

    def merge(self, difference: dict[str, Any], where: str, at: Key = ()) -> None:
        """Merge `difference` over the values. `where` names its place, e.g. `experiments/a.yaml: runs.LR1.`"""
        target = self.values
        for key in at:
            target = target[key]
        if ONE_OF.get(at, set()) & difference.keys():
            for key in ONE_OF[at] - difference.keys():
                target.pop(key, None)
        for key, value in difference.items():
            path = (*at, key)
            self.origin[path] = where
            if not isinstance(value, dict):
                target[key] = value
                continue
            if path in WHOLE or not isinstance(target.get(key), dict):
                target[key] = {}
            self.merge(value, where, path)

    def place(self, path: Key) -> str:
        """Where the value at `path`, or the closest one around it, was written, followed by the key path."""
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.origin), None)
        return (self.origin[known] if known else "") + ".".join(path)


def names(folder: Path = EXPERIMENTS) -> dict[str, str]:
    """All runs in the order of the files: name -> note."""
    return {name: note for name, (_, _, note) in _all(folder).items()}


def groups(folder: Path = EXPERIMENTS) -> dict[str, list[str]]:
    """All runs by their file, in its order: file name without `.yaml` -> names of runs."""
    found: dict[str, list[str]] = {}
    for name, (file, _, _) in _all(folder).items():
        found.setdefault(file.stem, []).append(name)
    return found


def settings(name: str, folder: Path = EXPERIMENTS) -> Settings:
    """The settings that the files give the run `name`. Raises UserError with the closest name if there is none."""
    runs = _all(folder)
    if name not in runs:
        raise UserError(f"no run is called '{name}' in {_short(folder)}{did_you_mean(name, runs)}; --list shows all")
    file, differences, note = runs[name]
    merged = _with_base(file, ())
    for where, difference in differences:
        merged.merge(difference, f"{_short(file)}: {where}.")
    merged.values["note"] = note
    return merged


def apply_overrides(merged: Settings, overrides: list[str]) -> None:
    """Merge `section.key=value` from a command line over the settings; the value is YAML."""
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise UserError(f"command line: '{text}' is not of the form section.key=value")
        try:
            difference = parse(value)
        except yaml.YAMLError as error:
            raise UserError(f"command line: {path}: '{value[:60]}' is not YAML ({one_line(error)})") from None
        # A single key changes one entry even where a whole mapping would replace another.
        target = merged.values
        for depth, key in enumerate(keys[:-1]):
            if key not in target:
                merged.origin[tuple(keys[: depth + 1])] = "command line: "
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UserError(f"command line: {path}: {'.'.join(keys[: depth + 1])} is {target!r} and has no keys")
        merged.merge({keys[-1]: difference}, "command line: ", tuple(keys[:-1]))


def flat(values: dict[str, Any], at: Key = ()) -> dict[str, Any]:
    """Nested settings by key path, `optim.clip`; those in `WHOLE` are one setting."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = (*at, key)
        inside = isinstance(value, dict) and path not in WHOLE
        found |= flat(value, path) if inside else {".".join(path): value}
    return found


def _all(folder: Path) -> dict[str, Run]:
    files = {file.name: file for file in (SHIPPED / "experiments").glob("*.yaml") if folder == EXPERIMENTS}
    files |= {file.name: file for file in folder.glob("*.yaml")}
    if not files:
        raise UserError(f"no experiments in the folder {folder}")
    found: dict[str, Run] = {}
    for _, file in sorted(files.items()):
        content = read(file)
        for name, run in _runs(file, content):
            if name in found:
                raise UserError(f"{_short(file)}: {name}: {_short(found[name][0])} has a run of that name already")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise UserError(f"{_short(file)}: '{name}': a name is a folder too: letters, digits, '.', '_' and '-'")
            found[name] = run
    return found


def _runs(file: Path, content: dict[str, Any]) -> list[tuple[str, Run]]:
    """The runs of a file, then the points of its grid."""
    runs = [(name, [(f"runs.{name}", changes)]) for name, changes in _mapping(file, content, "runs").items()]
    axes = _mapping(file, content, "grid")
    sizes = [len(_mapping(file, axes, axis, "grid.")) for axis in axes]
    if math.prod(sizes) > MOST:
        raise UserError(f"{_short(file)}: grid: {math.prod(sizes):,} runs are too many (at most {MOST:,})")
    for point in itertools.product(*axes.values()) if axes else ():
        at = zip(axes, point, strict=True)
        runs.append(("-".join(point), [(f"grid.{axis}.{value}", axes[axis][value]) for axis, value in at]))
    return [(name, (file, changes, ", ".join(_note(file, *one) for one in changes))) for name, changes in runs]


def _with_base(file: Path, above: tuple[Path, ...]) -> Settings:
    if file in above:
        chain = " -> ".join(_short(f) for f in (*above[above.index(file) :], file))
        raise UserError(f"{_short(above[-1])}: base: these files include each other: {chain}")
    content = read(file)
    merged = Settings()
    if "base" in content:
        name = content["base"]
        places = [(folder / str(name)).resolve() for folder in (file.parent, SHIPPED / "experiments")]
        base = next((place for place in places if place.is_file()), places[0])
        if not isinstance(name, str) or not base.is_file():
            there = [f.name for f in base.parent.glob("*.yaml")]
            raise UserError(f"{_short(file)}: base: no file '{name}' beside it{did_you_mean(str(name), there)}")
        merged = _with_base(base, (*above, file))
    merged.merge({k: v for k, v in content.items() if k not in FORMS}, f"{_short(file)}: ")
    return merged


def _note(file: Path, where: str, difference: Any) -> str:
    note = difference.get("note") if isinstance(difference, dict) else None
    if not isinstance(note, str) or not note.strip():
        raise UserError(f"{_short(file)}: {where}: needs a note that says in one line what it asks")
    return note.strip()


def _mapping(file: Path, content: dict[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{_short(file)}: {where}{key}: must be a mapping of names")
    return value


def _mistake(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `1e-4` is a number, `no` and `1:30` are words. A repeated key is an error, and so are
    more than `MOST` values (aliases counted as often as they are used) or `DEEPEST` levels."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        if getattr(self.peek_event(), "tag", None):
            raise _mistake("a tag (like !!int) has no meaning here", self.peek_event())
        self.depth += 1
        if self.depth > DEEPEST:
            raise _mistake(f"nested more than {DEEPEST} deep", self.peek_event())
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if alias and not hasattr(node, "size"):
            raise _mistake("an anchor that contains itself", node)
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        node.size = 1 + sum(n.size for item in inner for n in (item if isinstance(item, tuple) else (item,)))
        if node.size > MOST:
            raise _mistake(f"more than {MOST:,} values", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key in seen:
                what = "a key must be a word" if key is None else f"'{key}' is given twice"
                raise _mistake(what, key_node)
            seen[key] = self.construct_object(value_node, deep=deep)
        return seen

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            return super().construct_yaml_int(node)
        except ValueError:  # more digits than Python converts
            raise _mistake("a number too long", node) from None


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", r"null|~|", "n~"),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
]:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first, ""])
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back: quotes a word that would read as a number."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def parse(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader)


_parsed = functools.cache(parse)  # shared by all callers: planning a sweep reads each file once for each run


def read(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, not to be changed. Raises UserError with file and line."""
    try:
        content = _parsed(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{_short(file)}: {one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_short(file)}: byte {error.start} is not UTF-8") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{_short(file)}: must be a mapping of sections")
    for key in content:
        if key not in SECTIONS + FORMS:
            unknown = f"unknown section{did_you_mean(key, SECTIONS + FORMS)}"
            raise UserError(f"{_short(file)}: {key}: {RENAMED.get(key, unknown)}")
    return content


def one_line(error: yaml.YAMLError) -> str:
    """Where in a YAML text it is wrong, and why."""
    mark = getattr(error, "problem_mark", None)
    return (f"line {mark.line + 1}: " if mark else "") + (getattr(error, "problem", None) or "cannot be read")
