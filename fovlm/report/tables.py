"""The report's numbers as CSV, one file for each kind."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fovlm.report.grid import Grid
from fovlm.report.questions import Answer
from fovlm.report.runs import Evidence, RunRecord
from fovlm.report.scaling_law import Fit
from fovlm.report.statistics import Verdict

RUN = ("name", "label", "size", "budget", "arch", "seed", "loss", "parameters", "samples", "flops_per_sample", "flops",
       "val_set")  # fmt: skip
SUMMARY = ("wall_seconds", "data_hash", "commit")
CURVES = ("loss", "val_loss", "loss_fine", "loss_coarse", "fine_over_coarse", "attention_entropy", "grad_norm")
CELL = ("size", "budget", "arch", "N", "D", "flops", "loss")
OPTIMUM = ("size", "low", "high", "sure")


def write(out: Path, evidence: Evidence, found: list[Answer], cells: Grid | None) -> None:
    """Write runs.csv, decisions.csv and curves.csv, and with a grid also grid.csv and fits.csv."""
    runs = evidence.runs
    _csv(out / "runs.csv", ("run", "side", *RUN[2:6], "val_loss", "autoregressive", *RUN[7:], *SUMMARY), [
        [*values[:7], run.mode("autoregressive"), *values[7:], *map(run.summary.get, SUMMARY)]
        for run in runs
        for values in [[getattr(run, key) for key in RUN]]
    ])  # fmt: skip
    _csv(out / "decisions.csv", ("question", "winner", "verdict", "rival", "more_than_best", "low", "high", "level"), [
        [answer.title, answer.verdict.winner, answer.verdict.text, *numbers]
        for answer in found
        for numbers in _differences(answer.verdict)
    ])  # fmt: skip
    _csv(out / "curves.csv", ("run", "step", "samples", *CURVES), [
        [run.name, int(row["step"]), *(row.get(column) for column in ("samples", *CURVES))]
        for run in runs
        for row in run.rows
    ])  # fmt: skip
    if cells is None:
        return
    _csv(out / "grid.csv", (*CELL, "seeds", "best_size", *OPTIMUM[1:]), [
        [*(getattr(c, key) for key in CELL), len(c.losses),
         *(getattr(cells.optima.get((c.arch, c.budget)), key, None) for key in OPTIMUM)]
        for c in cells.cells
    ])  # fmt: skip
    _csv(out / "fits.csv", ("arch", "parameter", "value", "low", "high", "points"), [
        [arch, name, value, *interval, fit.points]
        for arch, fit in cells.fits.items()
        for name, (value, interval) in parts(fit).items()
    ])  # fmt: skip


def parts(fit: Fit) -> dict[str, tuple[float, tuple[float, float]]]:
    """(value, interval) of a law's parameters and of the exponent of the best size where it has one, by name."""
    values = {**vars(fit.law), "exponent": fit.exponent}
    return {name: (value, fit.intervals[name]) for name, value in values.items() if value is not None}


def overview(runs: Sequence[RunRecord]) -> tuple[Sequence[str], Sequence[tuple[str, ...]]]:
    """Head and rows of the table of all runs."""
    head = ("run", "note", "seed", "val loss", "parameters", "samples", "FLOPs", "minutes")
    rows = [
        (run.name, run.experiment.note, str(run.seed), f"{run.loss:.4f}", f"{run.parameters:,}", f"{run.samples:,.0f}",
         f"{run.flops:.3g}", f"{run.summary.get('wall_seconds', 0) / 60:.1f}")
        for run in runs
    ]  # fmt: skip
    return head, rows


def _differences(verdict: Verdict) -> list[Sequence[Any]]:
    """The numbers of each rival; one row without numbers when there is none."""
    numbers = [(rival, d.value, d.low, d.high, verdict.level) for rival, d in verdict.differences.items()]
    return [*numbers] or [("", None, None, None, None)]


def _csv(file: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(head)
        for row in rows:
            writer.writerow(["" if v is None else f"{v:.8g}" if isinstance(v, float) else v for v in row])
