"""A page of blocks, written twice from one structure: Markdown with figures beside it, and one self-contained HTML."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: .88rem; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { font-size: .88rem; color: #555; }
.verdict { border-left: 4px solid #999; padding: .3rem .8rem; background: #f6f6f6; }
.decided { border-color: #0072B2; background: #eef5fa; }
@media print { body { font-size: 11px; } h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bold:
    """A verdict: `decided` colours it."""

    text: str
    decided: bool


@dataclass(frozen=True)
class Points:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture beside the page."""

    file: Path
    caption: str


Block = Heading | Text | Bold | Points | Table | Figure


def markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown; figures are named relative to it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as HTML, figures inside."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n'
        "</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Bold(text):
            return f"**{_plain(text)}**"
        case Points(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Table(head, rows):
            lines = ([_plain(cell).replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows))
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Figure(file, caption):
            return f"![{_plain(caption)}]({file.name})\n\n*{_plain(caption)}*"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Bold(text, decided):
            return f'<p class="verdict{" decided" if decided else ""}"><strong>{html.escape(text)}</strong></p>'
        case Points(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Table(head, rows):
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            return f"<table><tr>{top}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
        case Figure(file, caption):
            inside = base64.b64encode(file.read_bytes()).decode()
            source = f"data:{KINDS[file.suffix]};base64,{inside}"
            told = html.escape(caption)
            return f'<figure><img src="{source}" alt="{told}"><figcaption>{told}</figcaption></figure>'


def _plain(text: str) -> str:
    """Signs that Markdown would take for its own."""
    for sign in ("\\", "*", "_", "`", "<"):
        text = text.replace(sign, f"\\{sign}")
    return text
