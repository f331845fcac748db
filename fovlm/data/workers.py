"""Run calls in parallel processes, which end with their parent, and bound what one call may take of memory."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import TypeVar

from fovlm.errors import UserError

MEMORY = 200 << 20  # bytes that reading one sample may take in a worker
DECODING = 128 << 20  # and, beside twice its own, of a large one
T = TypeVar("T")


def each(call: Callable[..., T], arguments: list[tuple], workers: int) -> Iterator[T]:
    """The results of `call` on each of the arguments, as they are done; one worker runs in this process. Raises
    UserError when a worker is killed, and whatever `call` raises."""
    if workers == 1 or len(arguments) < 2:
        for one in arguments:
            yield call(*one)
        return
    # A plain fork would copy the locks of running threads. The fork server imports once for all workers.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["fovlm.data.fork_server", "fovlm.prepare.write_shard"])
        resource_tracker.ensure_running()  # the fork server would start it, which unblocks signals
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    pool = ProcessPoolExecutor(min(workers, len(arguments)), context, follow_parent, (signal.SIGINT,))
    finished = False
    try:
        running: list[Future[T]] = [pool.submit(call, *one) for one in arguments]
        for done in as_completed(running):
            running.remove(done)  # releases its result
            yield done.result()
        finished = True
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed, probably out of memory: use fewer --workers or a smaller --per-shard"
        ) from error
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)


@contextmanager
def bounded_memory(more: int = MEMORY) -> Iterator[None]:
    """Within the block this process cannot take over `more` bytes: decoders then fail, whatever a file makes them do.

    For workers, where no other thread needs memory meanwhile. Only Linux counts it (proc(5), setrlimit(2)).
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def follow_parent(*signals: int) -> None:
    """In a worker: leave these signals to the parent, and exit when the parent does, however it ends."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
