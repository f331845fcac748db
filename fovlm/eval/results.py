"""Results on disk: a line for each sample as soon as it is scored, and the numbers when all are there.

    OUT/SET/exam.json                 what is scored, of which model, and how: everything that decides the numbers
    OUT/SET/MODE.part-I-of-N.jsonl    while it runs: the lines of one rank
    OUT/SET/MODE.jsonl, MODE.json     in the end: all lines in order, and what they come to

A control is a folder of its own, OUT/SET/CONTROL. A run that was killed goes on from the lines that are there, on any
number of ranks; the rank that finds all lines there merges them.
"""

import json
from pathlib import Path
from typing import Any

from fovlm.errors import UserError
from fovlm.fileio import write_atomically

Line = dict[str, Any]


class Record:
    """The lines of one set, under one control or none, in one mode; `part` is (number from 0, how many ranks)."""

    def __init__(self, folder: Path, mode: str, questions: int, part: tuple[int, int] = (0, 1)):
        self.folder, self.mode, self.questions = folder, mode, questions
        self.own = folder / f"{mode}.part-{part[0]}-of-{part[1]}.jsonl"
        self.whole = folder / f"{mode}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        _mend(self.own)
        self.done = {line["n"] for line in self._there()}

    def add(self, line: Line) -> None:
        """Keep a line for good."""
        with open(self.own, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.done.add(line["n"])

    def merge(self) -> list[Line] | None:
        """All lines in order, written as one file; None while some are missing."""
        lines = {line["n"]: line for line in self._there()}
        if len(lines) < self.questions:
            return None
        ordered = [lines[n] for n in sorted(lines)]
        if not self.whole.is_file():
            write_atomically(self.whole, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered))
        for part in self.folder.glob(f"{self.mode}.part-*.jsonl"):
            part.unlink(missing_ok=True)
        return ordered

    def _there(self) -> list[Line]:
        if self.whole.is_file():
            return _lines(self.whole)
        found = []
        for part in sorted(self.folder.glob(f"{self.mode}.part-*.jsonl")):
            try:
                found += _lines(part)
            except FileNotFoundError:  # another rank has merged meanwhile
                return _lines(self.whole)
        return found


def _lines(path: Path) -> list[Line]:
    """The whole lines of a file; another rank may be writing the last one."""
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def _mend(path: Path) -> None:
    """Cut off what a kill left of a line."""
    if path.is_file():
        data = path.read_bytes()
        if len(whole := data[: data.rfind(b"\n") + 1]) < len(data):
            path.write_bytes(whole)


def agree(folder: Path, facts: dict[str, Any]) -> None:
    """Write what is scored beside the results, or hold it against what is there. Raises UserError when it differs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "exam.json"
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        for key in facts:
            if there.get(key) != facts[key]:
                told = f"{folder} holds results with {key} {there.get(key)}, and now it is {facts[key]}"
                raise UserError(f"{told}: give another --out, or remove the folder")
    else:
        write_atomically(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
