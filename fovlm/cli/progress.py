"""Progress of a command on the terminal's error stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(step: str) -> Iterator[Callable[..., None]]:
    """A spinner with the elapsed time, removed at the end; nothing where the error stream is not a terminal.

    Yields `update(done, total, step)`, which makes it a bar once a total is known; `step` renames it.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar, columns = BarColumn(), (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(escape(step), total=None)

        def update(done: int, total: int, step: str = step) -> None:
            shown.columns = (*columns, bar) if total else columns
            shown.update(task, completed=done, total=total or None, description=escape(step))

        yield update
