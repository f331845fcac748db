"""`python -m fovlm.train NAME [section.key=value ...]`: train a run."""

import sys

from fovlm.train.trainer import main

if __name__ == "__main__":
    sys.exit(main())
