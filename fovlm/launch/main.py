"""`./launch.sh NAME ...`: check the run, start its ranks, pass signals on, report how it ended."""

import os
import shlex
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from fovlm.config import experiments
from fovlm.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError, format_error, say
from fovlm.launch.commands import command_of
from fovlm.launch.nodes import Nodes
from fovlm.launch.processes import SIGNALS, Run, on_signals
from fovlm.launch.request import Request, parse
from fovlm.launch.resources import find_resources
from fovlm.paths import INSTALLED, ROOT, TRAIN
from fovlm.progress import hide_foreign_bars

# Starts a run. launch.sh makes the environment first; an installed package has one.
COMMAND = (sys.executable, "-m", "fovlm", "train") if INSTALLED else (str(ROOT / "launch.sh"),)


class Stopped(Exception):
    """A signal came before the ranks were started."""


def last_line(request: Request, status: int, killed: bool = False) -> str:
    """What to say after a run that ended with `status`; empty when the run said everything itself.

    `killed`: by a second Ctrl-C.
    """
    words = [word for word in request.words if not word.startswith("train.resume=")]  # what is saved now is newer
    again = f"to resume: {TRAIN} {shlex.join(words)}"
    if status in (0, EXIT_USER_ERROR):
        return ""
    if status == EXIT_STOPPED:
        return f"{words[0]} saved and stopped; {again}"
    if killed:
        return f"{words[0]} stopped at once; from the last good checkpoint, {again}"
    cause = ": a rank was killed by signal 9, often because memory ran out" if status == 137 else ", see above"
    return f"{words[0]} failed (status {status}){cause}; from the last good checkpoint, {again}"


def launch(request: Request) -> int:
    """Check a run and train it to its end; returns the exit status. Raises UserError before anything starts."""
    from fovlm.config import deepspeed, schema
    from fovlm.config.existing_run import check_same_settings
    from fovlm.data.inputs import check_inputs, from_hub, hub_answers, missing_inputs

    where = find_resources(request.chooses)
    experiment = schema.load(request.words[0], list(request.words[1:]))
    deepspeed.resolve(experiment, where.world, where.device)
    if where.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if request.dry_run:
        if missing := missing_inputs(experiment):
            say(f"{experiment.name} cannot start yet: {missing}")
        os.environ["WORLD_SIZE"] = str(where.world)
        os.execv(sys.executable, [sys.executable, "-m", "fovlm.train", *request.words, "--dry-run"])
    check_same_settings(experiment)
    if not where.hosts:  # this machine may be none of the nodes
        check_inputs(experiment)
        if from_hub(experiment) and not hub_answers():
            os.environ["HF_HUB_OFFLINE"] = "1"  # everything is cached
    command, env = command_of(request, where)
    run = Nodes(command, env, where) if where.hosts else Run(command, env, through_srun=where.slurm)
    status = run.wait()
    if run.stop_asked and not where.slurm and status - 128 in SIGNALS:  # the ranks had no handler yet
        raise Stopped
    if line := last_line(request, status, run.killed):
        say(line)
    return status


def main(words: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a mistake that one line explains, 75 when a signal stopped the run."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped

    hide_foreign_bars()
    words = sys.argv[1:] if words is None else words
    try:
        request = parse(words)
        if request.list_runs:
            notes = experiments.names().items()
            with suppress(BrokenPipeError):  # a reader that has seen enough, like `head`
                print("\n".join(f"{run:{max(len(run) for run, _ in notes)}}  {note}" for run, note in notes))
            return 0
        on_signals(stop)
        return launch(request)
    except Stopped:
        say(f"{request.words[0]} stopped before the first step; the same command starts it again")
        return EXIT_STOPPED
    except (UserError, OSError) as error:
        if not (problem := format_error(error)):
            raise
        say(problem)
        return EXIT_USER_ERROR
