"""The report's numbers as CSV, one file for each kind."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fovlm.report.grid import Grid
from fovlm.report.questions import Answer
from fovlm.report.runs import Evidence, RunRecord
from fovlm.report.scaling_law import Fit

CURVES = ("loss", "val_loss", "loss_fine", "loss_coarse", "fine_over_coarse", "attention_entropy", "grad_norm")


def write(out: Path, evidence: Evidence, found: list[Answer], cells: Grid | None) -> None:
    """Write runs.csv, decisions.csv and curves.csv, and with a grid also grid.csv and fits.csv."""
    _csv(
        out / "runs.csv",
        ("run", "side", "size", "budget", "arch", "seed", "val_loss", "autoregressive", "parameters", "samples",
         "flops_per_sample", "flops", "wall_seconds", "val_set", "data_hash", "commit"),
        (
            (run.name, run.label, run.size, run.budget, run.arch, run.seed, run.loss, run.mode("autoregressive"),
             run.parameters, run.samples, run.flops_per_sample, run.flops,
             run.summary.get("wall_seconds"), run.val_set, run.summary.get("data_hash"), run.summary.get("commit"))
            for run in evidence.runs
        ),
    )  # fmt: skip
    _csv(
        out / "decisions.csv",
        ("question", "winner", "verdict", "rival", "more_than_best", "low", "high", "level"),
        (
            (answer.title, answer.verdict.winner, answer.verdict.text, *numbers)
            for answer in found
            for numbers in _differences(answer)
        ),
    )
    _csv(
        out / "curves.csv",
        ("run", "step", "samples", *CURVES),
        (
            (run.name, int(row["step"]), row.get("samples"), *(row.get(column) for column in CURVES))
            for run in evidence.runs
            for row in run.rows
        ),
    )
    if cells is None:
        return
    _csv(
        out / "grid.csv",
        ("size", "budget", "arch", "N", "D", "flops", "loss", "seeds", "best_size", "low", "high", "sure"),
        (
            (c.size, c.budget, c.arch, c.N, c.D, c.flops, c.loss, len(c.losses),
             *((o.size, o.low, o.high, o.sure) if (o := cells.optima.get((c.arch, c.budget))) else ()))
            for c in cells.cells
        ),
    )  # fmt: skip
    _csv(
        out / "fits.csv",
        ("arch", "parameter", "value", "low", "high", "points"),
        (
            (arch, name, value, *interval, fit.points)
            for arch, fit in cells.fits.items()
            for name, (value, interval) in parts(fit).items()
        ),
    )


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


def _differences(answer: Answer) -> list[tuple[Any, ...]]:
    """A line for each rival; one empty line for an answer without."""
    verdict = answer.verdict
    known = [(rival, d.value, d.low, d.high, verdict.level) for rival, d in verdict.differences.items()]
    return known or [("", None, None, None, None)]


def _csv(file: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(head)
        for row in rows:
            writer.writerow(["" if v is None else f"{v:.8g}" if isinstance(v, float) else v for v in row])
