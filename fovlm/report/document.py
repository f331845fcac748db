"""The page: pieces of Markdown with everything escaped, and one self-contained HTML file rendered from them."""

import base64
import html
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt

from fovlm.tables import markdown_table

KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def escape(text: str) -> str:
    """Text whose signs mean nothing to Markdown."""
    return re.sub(r"([\\*_`<&])", r"\\\1", text)


def heading(text: str, level: int = 2) -> str:
    return f"{'#' * level} {escape(text)}"


def verdict(text: str, decided: bool) -> str:
    """A quoted paragraph, bold when something is decided."""
    return f"> **{escape(text)}**" if decided else f"> {escape(text)}"


def points(items: Sequence[str]) -> str:
    """A list; "" without items."""
    return "\n".join(f"- {escape(item)}" for item in items)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; "" without rows."""
    if not rows:
        return ""
    cells = [[escape(cell) for cell in row] for row in (head, *rows)]
    return markdown_table(cells, range(len(head)))


def figure(file: Path | None, caption: str) -> str:
    """A picture beside the page, and its caption in italics; "" without a picture."""
    return "" if file is None else f"![{escape(caption)}]({file.name})\n\n*{escape(caption)}*"


def page(title: str, text: str, folder: Path) -> str:
    """The Markdown as one HTML file; pictures, which are files of `folder`, are inside it."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
        file = folder / tokens[index].attrs["src"]
        data = base64.b64encode(file.read_bytes()).decode()
        return f'<img src="data:{KINDS[file.suffix]};base64,{data}" alt="{html.escape(tokens[index].content)}">'

    parser.add_render_rule("image", image)
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body=parser.render(text))
