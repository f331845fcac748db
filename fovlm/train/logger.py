"""What a run writes about itself: metrics, log, terminal, wandb and a summary at the end. No other file imports wandb.

Only rank 0 writes; on the other ranks a Logger does nothing. In the run folder (`Experiment.run_folder`):

    metrics.jsonl      one line per log step; resuming drops the lines past the step resumed from
    log.txt            every message, with the time
    wandb/, wandb_id   wandb's files, and the id under which a resumed run continues
    run_summary.json   how it ended: commit, versions, data, best and final metrics, wall time

A row maps names to numbers. The terminal shows those in `SHOWN`; metrics.jsonl has all (`checkpoint/run_folder.py`).
"""

import json
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fovlm import __version__
from fovlm.checkpoint import run_folder
from fovlm.config.schema import Experiment
from fovlm.errors import UserError
from fovlm.fileio import write_atomically
from fovlm.paths import INSTALLED, ROOT, versions
from fovlm.redact import redact

# What the terminal shows of a row, in this order.
SHOWN = {
    "loss": "loss {:.4f}",
    "fine_over_coarse": "fine/coarse {:.3f}",
    "val_loss": "val {:.4f}",
    "samples_per_second": "{:.1f} samples/s",
    "waiting": "waiting {:.0%}",  # share of the time spent waiting for data
    "memory_gb": "{:.1f} GB",
}
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "webdataset", "wandb", "pydantic", "numpy")

Row = Mapping[str, float]


class Logger:
    """Opens the run folder and continues after `step`. Use as a context manager, or call `close`.

    `steps` is the length of the whole run, `data_hash` names its data in the summary.
    """

    def __init__(
        self,
        experiment: Experiment,
        steps: int,
        step: int = 0,
        rank: int = 0,
        data_hash: str = "",
        out: TextIO | None = None,
    ):
        self.experiment = experiment
        self.data_hash = data_hash
        self.step = step
        self.writes = rank == 0
        if not self.writes:
            return
        self.folder = experiment.run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        damaged = run_folder.truncate_metrics(self.folder, step)
        self.log_file = (self.folder / "log.txt").open("a", encoding="utf-8")
        rows = run_folder.read_metrics(self.folder)
        self.earlier = rows[-1].get("seconds", 0.0) if rows else 0.0
        self.began = time.monotonic()
        self.commit = commit()
        self.terminal = Terminal(experiment.name, steps, step, out if out is not None else sys.stdout)
        self.wandb = _open_wandb(experiment, self.folder)
        if damaged:
            self.info(f"dropped {damaged} damaged lines from {run_folder.METRICS}")

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier sessions included up to their last logged step."""
        return self.earlier + time.monotonic() - self.began

    def set_step(self, step: int) -> None:
        """`step` is done: move the progress bar, if there is one."""
        self.step = step
        if self.writes:
            self.terminal.set_step(step)

    def log(self, step: int, row: Row) -> None:
        """Write metrics of `step`. Several rows of one step complete each other."""
        self.step = step
        if not self.writes:
            return
        run_folder.append_metrics(self.folder, {"step": step, "seconds": round(self.seconds, 3), **row})
        self.terminal.row(step, row)
        self._to_wandb(lambda run: run.log({"step": step, **row}))

    def info(self, text: str) -> None:
        """A message: on the terminal above the bar, and in log.txt."""
        if not self.writes:
            return
        self.log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.log_file.flush()
        self.terminal.info(text)

    def close(self, status: str = "finished", **facts: Any) -> None:
        """Write run_summary.json with `status` (finished, stopped or failed) and further facts, and end wandb's run."""
        if not self.writes:
            return
        self.writes = False
        self.terminal.close()
        self.log_file.close()
        rows = run_folder.read_metrics(self.folder)
        summary = {
            "name": self.experiment.name,
            "note": self.experiment.note,
            "status": status,
            "step": self.step,
            "experiment_hash": self.experiment.hash,
            "data_hash": self.data_hash,
            "commit": self.commit,
            "versions": {"python": platform.python_version(), **versions(PACKAGES)},
            "wall_seconds": round(self.seconds, 1),
            "best": run_folder.best_losses(rows),
            "final": run_folder.final_values(rows),
            **facts,
        }
        text = json.dumps(summary, indent=2, default=str)
        write_atomically(self.folder / run_folder.SUMMARY, text, durable=True)
        best = {f"best/{name}": entry["value"] for name, entry in summary["best"].items()}
        self._to_wandb(lambda run: run.summary.update({"status": status, **best}))
        self._to_wandb(lambda run: run.finish(exit_code=0 if status == "finished" else 1))

    def _to_wandb(self, call: Callable[[Any], object]) -> None:
        """Call wandb. Its process can die before ours, as from SLURM's scancel, which signals every process of a job:
        then the run continues without it."""
        if self.wandb is None:
            return
        try:
            call(self.wandb)
        except OSError as error:
            import wandb

            self.wandb = None
            self.info(f"no connection to wandb ({error}): the run continues without it")
            with suppress(OSError):
                wandb.teardown()

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.close("failed", error=f"{kind.__name__}: {error}")


class Terminal:
    """A progress bar on a terminal; otherwise a plain line per row. No thread of its own."""

    def __init__(self, name: str, steps: int, step: int, out: TextIO):
        self.name, self.steps = name, steps
        self.console = Console(file=out, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self.progress = Progress(name, *columns, *times, console=self.console, auto_refresh=False)
            self.task = self.progress.add_task(name, total=steps, completed=step, shown="")
            self.progress.start()

    def set_step(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step, refresh=True)

    def row(self, step: int, row: Row) -> None:
        shown = "  ".join(text.format(row[key]) for key, text in SHOWN.items() if key in row)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, shown=shown, refresh=True)
        elif shown:
            self.info(f"{self.name} {step}/{self.steps}  {shown}")

    def info(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _open_wandb(experiment: Experiment, folder: Path) -> Any:
    if experiment.logger.wandb == "disabled":
        return None
    import wandb  # takes a second and starts a process: only where it is enabled

    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(
            project=experiment.logger.project,
            entity=experiment.logger.entity,
            name=experiment.name,
            notes=experiment.note,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=experiment.logger.wandb,
            dir=folder,
            config=redact(experiment.model_dump()),
            # Nothing of the machine: no paths, no command line, no user, no code, no terminal.
            settings=wandb.Settings(
                x_disable_meta=True,
                x_disable_machine_info=True,
                disable_git=True,
                disable_code=True,
                x_save_requirements=False,
                host="-",
                console="off",
                silent=True,
            ),
        )
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {redact(str(error))}; or train without it: logger.wandb=offline") from None
    run.define_metric("*", step_metric="step")
    return run


def commit() -> str | None:
    """The commit of this project, with `+` when tracked files differ from it; of an installed package its version.
    None elsewhere."""
    if INSTALLED:
        return f"fovlm {__version__}"
    try:
        head, changed = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")
