"""`fovlm COMMAND ...`, also as `python -m fovlm`: puts the commands together and turns mistakes into one line.

Commands import what they need when they run, so that `fovlm --help` is there at once.
"""

import sys

import typer

from fovlm.cli import data, evidence, run, use
from fovlm.errors import EXIT_USER_ERROR, UserError

app = typer.Typer(
    name="fovlm",
    help="Video language models that decide where to look: prepare data, run experiments, ask, and see.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a traceback is for bugs, and then a plain one
)
for part in (use, data, evidence, run):
    part.register(app)
app.callback()(lambda: None)  # with this, a single command has a name too


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 for a mistake that one line explains."""
    try:
        status = app(arguments, standalone_mode=True)
    except UserError as error:
        print(f"fovlm: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return int(status or 0)
