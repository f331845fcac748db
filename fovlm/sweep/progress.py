"""Progress of a sweep: live bars on a terminal, periodic lines otherwise."""

from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fovlm.checkpoint.run_folder import read_metrics
from fovlm.sweep.select import PlannedRun
from fovlm.train.logger import SHOWN

LINES = 10  # in the life of a run, where there is no bar


class SweepProgress:
    """Shows `total` runs. A context manager; call `update` now and then."""

    def __init__(self, total: int, out: TextIO | None = None):
        self.total, self.ended = total, 0
        self.console = Console(file=out, highlight=False, soft_wrap=True)
        self.tasks: dict[str, TaskID] = {}
        self.shares: dict[str, float] = {}  # of each run, when a line was last printed
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(),
                   TextColumn("{task.fields[shown]}"), TimeElapsedColumn())  # fmt: skip
        self.bars = Progress(*columns, console=self.console, auto_refresh=False)
        self.all = self.bars.add_task("all", total=total, shown="")

    def say(self, text: str) -> None:
        """Print a line."""
        with suppress(OSError):  # a terminal that is gone must not end the sweep
            self.console.print(text, markup=False)

    def start(self, run: PlannedRun, where: str, resumes: bool) -> None:
        """A run starts; `where` says on what."""
        self.shares[run.name] = read_progress(run)[0] if resumes else 0.0
        self.tasks[run.name] = self.bars.add_task(run.name, total=1.0, shown="starting")
        if not self.console.is_terminal:
            self.say(f"{run.name} {'resumes' if resumes else 'starts'}{where}")

    def end(self, run: PlannedRun, text: str) -> None:
        """A run has ended, or need not run: `text` says how."""
        self.ended += 1
        if run.name in self.tasks:
            self.bars.remove_task(self.tasks.pop(run.name))
        self.say(f"[{self.ended}/{self.total}] {run.name}: {text}")

    def update(self, running: Iterable[PlannedRun]) -> None:
        """Read how far each running run is, and show it."""
        done = float(self.ended)
        for run in running:
            share, shown = read_progress(run)
            done += share
            self.bars.update(self.tasks[run.name], completed=share, shown=shown or "starting")
            if not self.console.is_terminal and int(share * LINES) > int(self.shares[run.name] * LINES):
                self.shares[run.name] = share
                self.say(f"{run.name} {share:4.0%}  {shown}")
        self.bars.update(self.all, completed=done, shown=f"{self.ended} of {self.total} runs")
        if self.console.is_terminal:
            with suppress(OSError):
                self.bars.refresh()

    def __enter__(self) -> "SweepProgress":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            with suppress(OSError):
                self.bars.stop()


def read_progress(run: PlannedRun) -> tuple[float, str]:
    """How much of a run is done, and its newest values."""
    rows = read_metrics(run.folder)
    newest = {key: row[key] for row in rows[-20:] for key in SHOWN if key in row}
    shown = "  ".join(text.format(newest[key]) for key, text in SHOWN.items() if key in newest)
    return next((row["progress"] for row in reversed(rows) if "progress" in row), 0.0), shown


def duration(seconds: float) -> str:
    """75 -> `1:15`; 3700 -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
