"""Results on disk: one line per sample as soon as it is scored, and the metrics when all samples are done.

    OUT/SET/eval.json                 what is scored, by which model and settings
    OUT/SET/MODE.part-I-of-N.jsonl    while running: the samples of one rank
    OUT/SET/MODE.jsonl, MODE.json     at the end: all samples in order, and their metrics

A control has a folder of its own, OUT/SET/CONTROL. A killed run resumes from the samples on disk, on any number of
ranks; the rank that finds all samples there merges them.
"""

import json
from pathlib import Path
from typing import Any

from fovlm.errors import UserError
from fovlm.fileio import write_atomically

VERSION = 3  # of the files, and of what controls mean
SampleResult = dict[str, Any]


class ResultFile:
    """The results of one set, in one mode, under one control or none; `part` is (rank, number of ranks)."""

    def __init__(self, folder: Path, mode: str, samples: int, part: tuple[int, int] = (0, 1)):
        self.folder, self.mode, self.samples = folder, mode, samples
        self.own = folder / f"{mode}.part-{part[0]}-of-{part[1]}.jsonl"
        self.merged = folder / f"{mode}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        _truncate(self.own)
        self.done = {result["n"] for result in self._on_disk()}

    def add(self, result: SampleResult) -> None:
        """Append a sample to the file."""
        with open(self.own, "a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        self.done.add(result["n"])

    def merge(self) -> list[SampleResult] | None:
        """All samples in order, written to one file; None while some are missing."""
        found = {result["n"]: result for result in self._on_disk()}
        if len(found) < self.samples:
            return None
        ordered = [found[n] for n in sorted(found)]
        if not self.merged.is_file():
            write_atomically(self.merged, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered))
        for part in self.folder.glob(f"{self.mode}.part-*.jsonl"):
            part.unlink(missing_ok=True)
        return ordered

    def _on_disk(self) -> list[SampleResult]:
        if self.merged.is_file():
            return _read(self.merged)
        found = []
        for part in sorted(self.folder.glob(f"{self.mode}.part-*.jsonl")):
            try:
                found += _read(part)
            except FileNotFoundError:  # another rank has just merged
                return _read(self.merged)
        return found


def _read(path: Path) -> list[SampleResult]:
    """The complete lines of a file; another rank may be writing the last one."""
    text = path.read_bytes()
    return [_parse(path, line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and its samples are scored again") from error


def _truncate(path: Path) -> None:
    """Remove an incomplete last line, which a killed run leaves."""
    if path.is_file():
        data = path.read_bytes()
        if len(whole := data[: data.rfind(b"\n") + 1]) < len(data):
            path.write_bytes(whole)


def check_or_write(folder: Path, facts: dict[str, Any]) -> None:
    """Write `facts` to eval.json, or compare them with the file there. Raises UserError when they differ."""
    facts = {"version": VERSION} | facts
    path = folder / "eval.json"
    if (folder / "exam.json").is_file():
        raise UserError(f"{folder} holds results of an older version: give another --out, or remove the folder")
    if not path.is_file():
        write_atomically(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        return
    found = _parse(path, path.read_bytes())
    for key in facts:
        if found.get(key) != facts[key]:
            what = "of another set or --limit: set_hash" if key == "set_hash" else f"with {key}"
            raise UserError(
                f"{folder} holds results {what} {found.get(key)}, not {facts[key]}: give another --out, or remove the "
                "folder"
            )
