"""How many runs at once are watched: bars where somebody looks, a line now and then where nobody does."""

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fovlm.checkpoint.run_folder import read_metrics
from fovlm.sweep.select import PlannedRun
from fovlm.train.logger import SHOWN

PLAIN = 10  # lines in the life of a run, where there is no bar


class SweepProgress:
    """`total` runs are to be done. Use as a context manager; call `look` now and then."""

    def __init__(self, total: int, out: TextIO | None = None):
        self.total, self.ended = total, 0
        self.console = Console(file=out, highlight=False, soft_wrap=True)
        self.began = time.monotonic()
        self.tasks: dict[str, TaskID] = {}
        self.tenths: dict[str, int] = {}
        self.progress: Progress | None = None
        if self.console.is_terminal:
            name, bar, share = TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn()
            columns = (name, bar, share, TextColumn("{task.fields[shown]}"), TimeElapsedColumn())
            self.progress = Progress(*columns, console=self.console, auto_refresh=False)
            self.all = self.progress.add_task("all", total=total, shown="")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def starts(self, run: PlannedRun, where: str, goes_on: bool) -> None:
        self.tenths[run.name] = int(self._read(run)[0] * PLAIN) if goes_on else 0
        if self.progress is not None:
            self.tasks[run.name] = self.progress.add_task(run.name, total=1.0, shown="starting")
        else:
            self.say(f"{run.name} {'goes on' if goes_on else 'starts'}{where}")

    def ends(self, run: PlannedRun, text: str) -> None:
        """A run is over, or need not be done: `text` says how."""
        self.ended += 1
        if self.progress is not None and run.name in self.tasks:
            self.progress.remove_task(self.tasks.pop(run.name))
        self.say(f"[{self.ended}/{self.total}] {run.name}: {text}")

    def look(self, running: list[PlannedRun]) -> None:
        """Read how far each running run is, and show it."""
        done = float(self.ended)
        for run in running:
            share, shown = self._read(run)
            done += share
            if self.progress is not None:
                self.progress.update(self.tasks[run.name], completed=share, shown=shown or "starting")
            elif int(share * PLAIN) > self.tenths[run.name]:
                self.tenths[run.name] = int(share * PLAIN)
                self.say(f"{run.name} {share:4.0%}  {shown}")
        if self.progress is not None:
            self.progress.update(self.all, completed=done, shown=f"{self.ended} of {self.total} runs")
            self.progress.refresh()

    def _read(self, run: PlannedRun) -> tuple[float, str]:
        rows = read_metrics(run.folder)
        if not rows:
            return 0.0, ""
        newest = {key: row[key] for row in rows[-20:] for key in SHOWN if key in row}
        shown = "  ".join(text.format(newest[key]) for key, text in SHOWN.items() if key in newest)
        share = next((row["progress"] for row in reversed(rows) if "progress" in row), 0.0)
        return share, shown

    def __enter__(self) -> "SweepProgress":
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()


def span(seconds: float) -> str:
    """75 -> `1:15`; 3700 -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
