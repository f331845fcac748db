"""`fovlm COMMAND ...`, also as `python -m fovlm`: puts the commands together and turns mistakes into one line.

Commands import what they need when they run, so that `fovlm --help` is there at once.
"""

import os
import sys
from typing import Any

import typer

from fovlm.cli import convert, data, evidence, report, run, use
from fovlm.errors import EXIT_USER_ERROR, UserError, did_you_mean, format_error

# Of the click that this release of typer brings or uses.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
INTERRUPTED = 130  # 128 + SIGINT, as shells say it

app = typer.Typer(
    name="fovlm",
    help="Video language models that spend one token on each frame and decide where to look.\n\n"
    "A first question: `fovlm ask clip.mp4 'What happens?' --model FOLDER`. Each command tells more with `--help`. "
    "One run is trained with `./launch.sh NAME`.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a traceback is for bugs, and then a plain one
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (data, run, evidence, report, convert, use):  # the order of the work, and of --help
    part.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 for a mistake that one line explains."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(words or ["--help"], prog_name="fovlm", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except ClickException as error:
        return _mistake(_usage(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # who read has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if not (said := format_error(error)):
            raise
        return _mistake(said)


def _mistake(line: str) -> int:
    print(f"fovlm: {line}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _usage(error: Any) -> str:
    """What click found wrong, where it is told right."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "fovlm"
    said = " ".join(error.format_message().split()).rstrip(".")
    if context and said.startswith("No such command"):
        word = said.split("'")[1]
        said = f"no command '{word}'{did_you_mean(word, context.command.commands)}"
    return f"{said[:1].lower()}{said[1:]}; see {command} --help"
