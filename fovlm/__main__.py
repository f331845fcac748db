"""`python -m fovlm` is the command `fovlm`."""

import atexit
import gc
import sys

from fovlm.cli import main as cli


def main() -> int:
    """Run one command; returns the exit status."""
    # torch and transformers bring 400,000 objects that live to the end: to look for garbage among them takes a second
    # of the start of a command, and another at its end.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
