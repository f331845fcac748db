"""Using a trained model: ask, look, demo, convert, import, bench."""

import typer


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
