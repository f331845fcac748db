"""`python -m fovlm.train NAME [section.key=value ...]`: train a run."""

import sys

from fovlm.train.process import keep_running_without_output, stop_without_launcher

if __name__ == "__main__":
    keep_running_without_output()
    stop_without_launcher()
    from fovlm.train.trainer import main  # takes seconds, in which launch.sh may end

    sys.exit(main())
