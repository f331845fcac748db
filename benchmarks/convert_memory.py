"""How much memory a conversion takes: python -m benchmarks.convert_memory RUN OUT [convert's options]

Samples /proc/self/status (Linux) while `fovlm.checkpoint.convert` works in this process: resident memory, and the part
of it that is no mapped file, which the system could not take back. Prints the peaks above what the imports alone take,
and their ratio to the bytes of the written model.
"""

import re
import sys
import threading
import time
from pathlib import Path

import fovlm.checkpoint.convert  # noqa: F401  (loaded before memory is measured)
from fovlm.cli.main import main as command


def used() -> tuple[int, int]:
    """Bytes of resident memory: all of it, and the anonymous part."""
    text = Path("/proc/self/status").read_text()
    total, anonymous = (int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) << 10 for key in ("VmRSS", "RssAnon"))
    return total, anonymous


def main() -> int:
    before, peak, working = used(), [0, 0], True

    def watch() -> None:
        while working:
            peak[:] = map(max, peak, used())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        status = command(["convert", *sys.argv[1:]])
    finally:
        working = False
        watcher.join()
    if status:
        return status
    size = sum(file.stat().st_size for file in Path(sys.argv[2]).glob("*.safetensors"))
    print(f"model {size / 1e6:.0f} MB, {time.monotonic() - began:.1f} s, imports alone {before[0] / 1e6:.0f} MB")
    for name, top, start in zip(("resident", "anonymous"), peak, before, strict=True):
        print(f"{name:>9}: peak {top / 1e6:.0f} MB, {(top - start) / 1e6:.0f} MB above: {(top - start) / size:.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
