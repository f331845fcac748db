"""Starts the ranks of a run; launch.sh makes the Python environment and runs `python -m fovlm.launch` in it,
an installed package has `fovlm train`.

    request     the command line
    resources   GPUs, a hostfile, a SLURM allocation
    commands    the launcher's command: deepspeed or srun
    processes   the processes of this machine: started, signalled, waited for
    nodes       those of a hostfile, over ssh; `agent` is the other end
    main        check, start, pass signals on, report the end

No torch here, and no pydantic for `--list`.
"""
