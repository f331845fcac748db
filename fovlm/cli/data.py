"""Making and checking data: prepare, check."""

import typer


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
