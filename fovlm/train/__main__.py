"""`python -m fovlm.train NAME [section.key=value ...]`: train a run."""

import gc
import os
import sys

from fovlm.train.process import keep_running_without_output, stop_without_launcher

if __name__ == "__main__":
    keep_running_without_output()
    stop_without_launcher()
    gc.disable()  # the imports make no garbage, and looking for it takes a second
    from fovlm.train.trainer import main  # takes seconds, in which launch.sh may end

    gc.freeze()
    gc.enable()
    status = main()
    if status:  # in an ordinary exit torch's threads may abort when another rank is gone, and 134 replaces the status
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()  # the end of Python looks for garbage again, another second
