"""From runs to answers: eval, run, report."""

import typer


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
