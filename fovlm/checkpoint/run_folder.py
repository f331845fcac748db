"""What a run records about itself in its folder: metrics.jsonl and run_summary.json. No torch.

    metrics.jsonl      a JSON object per line: `step`, `seconds` of wall time, and the numbers logged at that step.
                       Append-only: lines of the same step belong together, null is a number that was not finite.
    run_summary.json   how the run ended (`train/logger.py` writes it)

A crash can leave a partial line; a full disk or an editor can damage one anywhere. Such lines are skipped.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fovlm.fileio import write_atomically

METRICS = "metrics.jsonl"
SUMMARY = "run_summary.json"
BLIND = "best possible loss without the video (blind)"  # of the synthetic task, in the summary

Row = dict[str, float]


def read_metrics(folder: Path) -> list[Row]:
    """The finite numbers of every logged step in the order of steps; empty when there is no file yet."""
    rows: list[Row] = []
    for line in _lines(folder):
        if (row := _parse(line)) is None:
            continue
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1] |= row
        else:
            rows.append(row)
    return rows


def append_metrics(folder: Path, row: Mapping[str, float]) -> None:
    """Add a line. `row` has `step` (int)."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n")


def truncate_metrics(folder: Path, step: int) -> int:
    """Drop the lines past `step`, from which a run resumes, and damaged ones -> how many damaged lines there were."""
    lines = _lines(folder)
    rows = [_parse(line) for line in lines]
    kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
    write_atomically(folder / METRICS, "".join(f"{line}\n" for line in kept))
    return rows.count(None)


def best_losses(rows: list[Row]) -> dict[str, dict[str, float]]:
    """The lowest value of every loss, and its step."""
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.items():
            if "loss" in name and (name not in best or value < best[name]["value"]):
                best[name] = {"value": value, "step": row["step"]}
    return best


def final_values(rows: list[Row]) -> Row:
    """The last value of every metric."""
    final = {name: value for row in rows for name, value in row.items()}
    final.pop("step", None)
    return final


def read_summary(folder: Path) -> dict[str, Any]:
    """run_summary.json; empty when there is none (yet), or it is damaged."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _lines(folder: Path) -> list[str]:
    try:
        return (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _parse(line: str) -> Row | None:
    try:
        values = json.loads(line)
        if not isinstance(values["step"], int):
            return None
        return {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return None
