"""A hook of mkdocs: the page of `fovlm export quickstart --to page`, where it has been exported, becomes the demo.

docs/browser.md has a comment at the place of the link.
"""

import shutil
from pathlib import Path
from typing import Any

EXPORTED = Path(__file__).resolve().parent.parent / "exported" / "quickstart-page"
PLACE = "<!-- DEMO -->"
LINK = '<p><b><a href="demo/index.html">Try it here</a></b>: the quickstart model, on your machine.</p>'


def on_page_content(html: str, **given: Any) -> str:
    """Put the link in its place, or leave it empty."""
    return html.replace(PLACE, LINK if EXPORTED.is_dir() else "")


def on_post_build(config: Any, **given: Any) -> None:
    """Copy the page into the site."""
    if EXPORTED.is_dir():
        shutil.copytree(EXPORTED, Path(config["site_dir"]) / "demo", dirs_exist_ok=True)
