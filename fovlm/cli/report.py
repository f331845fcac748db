"""`fovlm report`: from finished runs to decisions."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="report", rich_help_panel="Training and evidence")(report)


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUNS...", help="Run folders, folders of them, globs, or what `fovlm run` took: 'nano/*'"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md, figures and CSV files.")],
    title: Annotated[str, typer.Option(help="Title of the page.")] = "What the runs say",
) -> None:
    """Write a page with the figures and what they decide: each decision with its rule, numbers and uncertainty."""
    from fovlm.report.build import write_report

    print(f"written: {write_report(runs, out, title)}")
