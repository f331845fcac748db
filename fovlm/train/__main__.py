"""`python -m fovlm.train NAME [section.key=value ...]`: train a run."""

import os
import sys

from fovlm.train.process import keep_running_without_output, stop_without_launcher

if __name__ == "__main__":
    keep_running_without_output()
    stop_without_launcher()
    from fovlm.train.trainer import main  # takes seconds, in which launch.sh may end

    status = main()
    if status:  # in an ordinary exit torch's threads may abort when another rank is gone, and 134 replaces the status
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
