"""The command line `fovlm COMMAND ...`, also `python -m fovlm`. User errors print one line and exit with status 2.

Commands import what they need when they run, so that `fovlm --help` is fast.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fovlm import __version__
from fovlm.cli import convert, data, evaluate, train, use
from fovlm.errors import EXIT_USER_ERROR, UserError, did_you_mean, format_error, say
from fovlm.paths import TRAIN
from fovlm.progress import hide_foreign_bars

# From the click that typer bundles or depends on, which differs between releases.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
RENAMED = {"run": "sweep", "--videos": "--media"}  # commands and options
INTERRUPTED = 130  # 128 + SIGINT, by the convention of shells

app = typer.Typer(
    name="fovlm",
    help="Video language models that spend one token on each frame and decide where to look.\n\n"
    "Ask a first question: `fovlm ask clip.mp4 'What happens?' --model FOLDER`. `fovlm COMMAND --help` explains a "
    f"command. `{TRAIN} NAME` trains one run.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # bugs show a plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"fovlm {__version__}")
        raise typer.Exit


PANELS: dict[str, tuple[Callable[..., None], ...]] = {  # in the order of --help
    "Data": (data.prepare, data.check),
    "Training": (train.train, train.sweep),
    "Evaluation": (evaluate.eval_, evaluate.report),
    "Using a model": (convert.convert, convert.import_, convert.export, use.ask, use.look, use.demo),
}
for panel, commands in PANELS.items():
    for command in commands:
        verbatim = train.Verbatim if command is train.train else None
        app.command(command.__name__.rstrip("_"), rich_help_panel=panel, cls=verbatim)(command)
app.add_typer(data.group, name="data", rich_help_panel="Data")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for a user error."""
    hide_foreign_bars()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait take the cores of others
    words = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(words or ["--help"], prog_name="fovlm", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except ClickException as error:
        say(_usage(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if not (message := format_error(error)):
            raise
        say(message)
        return EXIT_USER_ERROR


def _usage(error: Any) -> str:
    """Click's message, with the closest command and where to find help."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "fovlm"
    message = " ".join(error.format_message().split()).rstrip(".")
    if context and message.startswith("No such command"):
        word = message.split("'")[1]
        hint = f": renamed to '{RENAMED[word]}'" if word in RENAMED else did_you_mean(word, context.command.commands)
        message = f"no command '{word}'{hint}"
    elif (option := getattr(error, "option_name", "")) in RENAMED:
        message = f"no option {option}: renamed to {RENAMED[option]}"
    return f"{message[:1].lower()}{message[1:]}; see {command} --help"
