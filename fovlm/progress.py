"""Progress of work that may take long: a bar on a terminal, a line now and then elsewhere, nothing when it is quick."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

T = TypeVar("T")
DELAY = 2.0  # seconds before a bar appears
EVERY = 30.0  # seconds between two lines where there is no terminal


def hide_foreign_bars() -> None:
    """Without a terminal, the bars of other libraries (tqdm) would fill a log: switch them off before their import."""
    if not sys.stderr.isatty():
        for switch in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(switch, "1")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show on stderr how many are done, of `total` (by default their number, if they have one)."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = Progress(console=console, transient=True)
    task = bar.add_task(escape(description), total=total)
    began = said = time.monotonic()
    try:
        for done, item in enumerate(items, 1):
            yield item
            bar.advance(task)
            now = time.monotonic()
            if console.is_terminal and not bar.live.is_started and now - began > DELAY:
                bar.start()
            elif not console.is_terminal and now - said > EVERY:
                console.print(f"{description}: {done}" + (f" of {total}" if total else ""), markup=False)
                said = now
    finally:
        if bar.live.is_started:
            bar.stop()
