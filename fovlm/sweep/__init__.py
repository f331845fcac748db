"""Many runs in one command: select, run, watch, tabulate, estimate the cost."""
