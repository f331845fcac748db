"""`python -m fovlm` is the command `fovlm`."""

import sys

from fovlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
