"""`python -m fovlm.train NAME [section.key=value ...]`: train a run."""

import gc

from fovlm.train.process import exit_at_once, keep_running_without_output, stop_without_launcher

if __name__ == "__main__":
    keep_running_without_output()
    stop_without_launcher()
    gc.disable()  # the imports make no garbage, and looking for it takes a second
    from fovlm.train.trainer import main  # takes seconds, in which launch.sh may end

    gc.freeze()
    gc.enable()
    status = main()
    if status:
        exit_at_once(status)
    gc.freeze()  # the end of Python looks for garbage again, another second
