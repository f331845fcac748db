"""`python -m fovlm.launch NAME [section.key=value ...]`: what launch.sh runs."""

import sys

from fovlm.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
