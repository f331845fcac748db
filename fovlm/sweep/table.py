"""`runs.csv`: one row for each run below FOVLM_RUNS, kept up to date while it runs.

The file is read, changed and replaced as a whole under a lock, so that two `fovlm sweep` at once both leave their
rows. Numbers come from the run folder (`fovlm/checkpoint/run_folder.py`).
"""

import csv
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fovlm.checkpoint.run_folder import Row, read_metrics, read_summary
from fovlm.config.schema import Experiment
from fovlm.errors import UserError
from fovlm.fileio import locked, write_atomically
from fovlm.sweep.select import PlannedRun

FILE = "runs.csv"
# In this order; losses by mode and by source follow as they appear.
COLUMNS = (
    *("name", "group", "seed", "status", "size", "visual", "ranks", "device", "step", "samples", "flops"),
    *("val_loss", "wall_seconds", "samples_per_second", "commit", "experiment_hash", "data_hash", "val_hash"),
    *("started", "ended"),
)
# Columns that come from the summary of a finished run.
SUMMARY = ("ranks", "device", "samples", "flops", "wall_seconds", "commit", "experiment_hash", "data_hash", "val_hash")


def read(root: Path) -> dict[str, dict[str, str]]:
    """The rows of `root`/runs.csv by run; empty when there is no file. Raises UserError for a damaged one."""
    file = root / FILE
    if not file.is_file():
        return {}
    try:
        with file.open(newline="", encoding="utf-8") as f:
            return {row["name"]: dict.fromkeys(COLUMNS, "") | row for row in csv.DictReader(f)}
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{file} is damaged ({error!r}): move it away; `fovlm sweep` writes a new one") from error


def write(root: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Update rows of `root`/runs.csv by name, atomically. A column that is not given keeps its value."""
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f"{FILE}.lock"):
        all_rows: dict[str, dict[str, Any]] = {name: dict(row) for name, row in read(root).items()}
        for name, row in rows.items():
            all_rows.setdefault(name, {}).update(row)
        columns = list(dict.fromkeys([*COLUMNS, *(key for row in all_rows.values() for key in row)]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(all_rows.values())
        write_atomically(root / FILE, text.getvalue())


def row_of(run: PlannedRun, status: str, **more: Any) -> dict[str, Any]:
    """The row of a run, from its folder; `more` are further columns."""
    summary, metrics = read_summary(run.folder), read_metrics(run.folder)
    last = metrics[-1] if metrics else Row()
    speeds = [row["samples_per_second"] for row in metrics if "samples_per_second" in row]
    row: dict[str, Any] = {
        "name": run.name,
        "group": run.group,
        "seed": run.experiment.train.seed,
        "status": status,
        "size": size_of(run.experiment),
        "visual": run.experiment.model.visual,
        "step": last.get("step", ""),
        "samples": last.get("samples", ""),
        "wall_seconds": last.get("seconds", ""),
        "samples_per_second": round(statistics.median(speeds), 3) if speeds else "",
    }
    if status == "finished":
        row |= {key: summary[key] for key in SUMMARY if summary.get(key) is not None}
        row |= {key: value for key, value in summary["final"].items() if key.startswith("val_loss")}
    return row | more


def size_of(experiment: Experiment) -> str:
    """The two models in a word: `SmolLM2-135M-Instruct+dinov2-small`, or `64x2+64x2` (width x layers)."""
    return "+".join(
        model.rstrip("/").rpartition("/")[2]
        if isinstance(model, str)
        else f"{model.get('hidden_size', '?')}x{model.get('num_hidden_layers', '?')}"
        for model in (experiment.model.llm, experiment.model.encoder)
    )
