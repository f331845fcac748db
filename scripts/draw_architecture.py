"""Draw the figure of the architecture: `python -m scripts.draw_architecture` writes docs/figures/architecture-*.svg.

Above: one frame after another, as deployed. Below: the two parallel passes of training.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
TITLE = "fovlm: one query walks through the cached layers of each frame and becomes one token"
WIDTH, HEIGHT = 1000, 736
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif"
THEMES = {
    "light": {
        "paper": "#ffffff", "panel": "#f6f7f9", "edge": "#d5dae1", "ink": "#1c2430", "muted": "#5b6675",
        "query": "#c2410c", "cache": "#dbe8f8", "cache_edge": "#6d9bd1", "lm": "#ebe4f8", "lm_edge": "#9a82cf",
        "coarse": "#8a93a1", "dark": "#15181d",
    },
    "dark": {
        "paper": "#0d1117", "panel": "#161b22", "edge": "#30363d", "ink": "#e6edf3", "muted": "#9aa5b1",
        "query": "#ff8a4c", "cache": "#16304d", "cache_edge": "#4f8fd6", "lm": "#2a2145", "lm_edge": "#8b74cf",
        "coarse": "#8b949e", "dark": "#000000",
    },
}  # fmt: skip
QUESTION = ("what does the", "cyan square show?")
CYAN, PINK, YELLOW, BLUE = "#22b8c9", "#d65db1", "#e2b93b", "#4c6fdc"
# Of each frame: the objects as (column, row, colour, mark); the asked one, the cyan square, comes first.
FRAMES = (
    ((1, 2, CYAN, "5"), (3, 0, PINK, "2"), (0, 1, YELLOW, "7"), (2, 3, BLUE, "4")),
    ((3, 1, CYAN, "3"), (0, 0, BLUE, "6"), (1, 3, PINK, "1"), (1, 1, YELLOW, "0")),
    ((0, 3, CYAN, "6"), (2, 0, YELLOW, "2"), (3, 2, BLUE, "5"), (1, 1, PINK, "3")),
)
COLUMNS = (346, 580, 814)  # middle of each frame's column
LAYERS = ((184, "layer 12"), (216, "…"), (248, "layer 2"), (280, "layer 1"))  # top of each bar


class Drawing:
    """SVG elements in order; colours are names of a theme or plain hex values."""

    def __init__(self, theme: dict[str, str]):
        self.theme, self.parts = theme, []

    def colour(self, name: str) -> str:
        return self.theme.get(name, name)

    def box(self, x, y, w, h, fill="panel", edge="edge", radius=6, width=1.2):
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{self.colour(fill)}" '
            f'stroke="{self.colour(edge)}" stroke-width="{width}"/>'
        )

    def text(self, x, y, words, size=15, fill="ink", anchor="middle", weight=400):
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{self.colour(fill)}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{words}</text>'
        )

    def dot(self, x, y, r=7, fill="query", edge="query"):
        self.parts.append(
            f'<circle cx="{x}" cy="{y}" r="{r}" fill="{self.colour(fill)}" stroke="{self.colour(edge)}" '
            'stroke-width="2"/>'
        )

    def line(self, path, stroke="muted", width=1.8, head=True, dash=""):
        """`path` is the d of an SVG path; with `head` it ends in an arrow of the same colour."""
        marker = f' marker-end="url(#head-{stroke})"' if head else ""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.colour(stroke)}" stroke-width="{width}"{dashes}{marker}/>'
        )

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="head-{name}" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="8" markerHeight="8" '
            'markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0 0.6 L7.4 4 L0 7.4 Z" fill="{self.colour(name)}"/></marker>'
            for name in ("muted", "query", "coarse")
        )
        stops = "".join(
            f'<stop offset="{offset}" stop-color="{colour}" stop-opacity="{opacity}"/>'
            for offset, colour, opacity in ((0, "#ffe9a8", 0.9), (0.45, "#ff9d5c", 0.75), (1, "#ff8a4c", 0))
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img" font-family="{FONT}">\n<title>{TITLE}</title>\n'
            f'<defs>{heads}<radialGradient id="gaze">{stops}</radialGradient></defs>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def frame(d: Drawing, middle: int, number: int) -> None:
    """One column: the picture, its layers with cached keys and values, the query on its way up, the token."""
    left, top, cell = middle - 52, 350, 26
    size = 4 * cell
    walk = middle - 84  # the query's way up, left of the layers
    d.box(left - 3, top - 3, size + 6, size + 6, "dark", "edge", 5)
    grid = "".join(f"M{left + n * cell} {top} v{size} M{left} {top + n * cell} h{size} " for n in range(1, 4))
    d.line(grid, "#3a4048", 0.6, head=False)
    for n, (column, row, colour, mark) in enumerate(FRAMES[number]):
        x, y = left + column * cell, top + row * cell
        if n == 0:  # where the look lands
            d.parts.append(
                f'<clipPath id="frame{number}"><rect x="{left - 2}" y="{top - 2}" width="{size + 4}" '
                f'height="{size + 4}"/></clipPath><circle cx="{x + cell / 2}" cy="{y + cell / 2}" r="34" '
                f'fill="url(#gaze)" clip-path="url(#frame{number})"/>'
            )
        d.box(x + 3, y + 3, cell - 6, cell - 6, "none" if n == 0 else "dark", colour, 2, 3.4)
        d.text(x + cell / 2, y + cell / 2 + 5, mark, 14, "#15181d" if n == 0 else "#f3f4f6", weight=700)
    d.text(middle + 62, top + size - 2, f"frame {number + 1}", 15, "muted", "start")
    d.line(f"M{middle} {top - 6} V{LAYERS[-1][0] + 30}")
    for y, name in LAYERS:
        d.box(middle - 52, y, 116, 24, "cache", "cache_edge", 5)
        d.text(middle - 42, y + 17, name, 14, anchor="start")
        d.text(middle + 56, y + 17, "K V", 14, "cache_edge", "end", 700)
        if name != "…":
            d.line(f"M{walk + 9} {y + 12} H{middle - 55}", "query", 1.6)
    d.line(f"M{walk} {LAYERS[-1][0] + 12} V120", "query", 2.4)
    for y, name in LAYERS:
        if name != "…":
            d.dot(walk, y + 12, 6.5, "paper")
    d.dot(walk, 146, 8.5)


def as_deployed(d: Drawing) -> None:
    d.text(20, 26, "Frame by frame, as deployed", 18, anchor="start", weight=700)
    d.box(20, 42, 960, 74, "lm", "lm_edge", 9)
    d.text(36, 65, "language model", 16, anchor="start", weight=700)
    d.text(36, 86, QUESTION[0], 14, "muted", "start")
    d.text(36, 104, QUESTION[1], 14, "muted", "start")
    asks = LAYERS[-1][0] + 12
    for number, middle in enumerate(COLUMNS):
        frame(d, middle, number)
        walk = middle - 84
        d.text(walk, 96, f"token {number + 1}", 14)
        # The state before this frame's token asks for this frame's look.
        start = walk - 66
        if number:
            d.line(f"M{start - 138} 91 H{start - 30}", "muted", 1.4)
            d.text(start, 96, "state", 14, "query", weight=700)
        d.line(f"M{start} 104 V{asks - 6} Q{start} {asks} {start + 6} {asks} H{walk - 9}", "query", 2.4, dash="6 4")
    d.line(f"M{COLUMNS[2] - 56} 91 H{COLUMNS[2] + 50}", "muted", 1.4)
    d.text(COLUMNS[2] + 106, 76, "answer", 14, "muted")
    d.text(COLUMNS[2] + 106, 99, "5 3 6", 20, "query", weight=700)
    notes = (
        (151, "ink", "one token a frame"),
        (201, "muted", "The query attends", "to the patches in", "every layer."),
        (278, "muted", "The next query is the", "model’s own state."),
        (
            365,
            "muted",
            "The encoder (DINOv2)",
            "runs once per frame; its",
            "keys and values of all",
            "layers are cached.",
        ),
    )
    for y, colour, *lines in notes:
        for n, words in enumerate(lines):
            d.text(20, y + 19 * n, words, 15, colour, "start", 700 if colour == "ink" else 400)


def in_training(d: Drawing) -> None:
    top = 502
    d.line(f"M20 {top - 22} H980", "edge", 1.2, head=False)
    d.text(
        20, top + 10, "In training: all frames at once, two passes over the same cache", 18, anchor="start", weight=700
    )
    d.box(20, top + 32, 132, 180, "cache", "cache_edge", 8)
    for n, words in enumerate(("cached keys", "and values", "of all frames")):
        d.text(86, top + 102 + 21 * n, words, 15, weight=700 if n < 2 else 400)
    for row, kind, stroke in ((top + 32, "coarse", "coarse"), (top + 146, "fine", "query")):
        middle = row + 33
        asks = ("one static query", "for every frame") if kind == "coarse" else ("one query", "for each frame")
        d.box(196, row, 144, 66, "panel", stroke, 8)
        for n, words in enumerate(asks):
            d.text(268, row + 28 + 20 * n, words, 15)
        d.line(f"M340 {middle} H378", stroke, 2.2)
        d.box(382, row, 130, 66, "cache", "cache_edge", 8)
        d.text(447, row + 28, f"{kind} look", 15, weight=700)
        d.text(447, row + 48, "through all layers", 13.5, "muted")
        d.line(f"M512 {middle} H612", stroke, 2.2)
        for n in range(3):
            d.dot(540 + 22 * n, middle, 7.5, "paper" if kind == "coarse" else "query", stroke)
        d.box(616, row, 156, 66, "lm", "lm_edge", 8)
        d.text(694, row + 28, "language model", 15, weight=700)
        d.text(694, row + 48, "up to the last frame" if kind == "coarse" else "tokens and text", 13.5, "muted")
        d.line(f"M772 {middle} H812", stroke, 2.2)
        d.box(816, row, 164, 66, "panel", stroke, 8)
        ends = ("hidden states", "become queries") if kind == "coarse" else ("cross-entropy", "of the text")
        for n, words in enumerate(ends):
            d.text(898, row + 28 + 20 * n, words, 15, weight=700 if kind == "fine" and n == 0 else 400)
    y = top + 122
    d.line(
        f"M898 {top + 98} V{y - 8} Q898 {y} 890 {y} H276 Q268 {y} 268 {y + 8} V{top + 143}", "query", 2.2, dash="6 4"
    )
    d.line(f"M152 {top + 65} H170 V{top + 16 + 8} H447 V{top + 29}", "muted", 1.4)
    d.line(f"M152 {top + 179} H170 V{top + 222} H447 V{top + 215}", "muted", 1.4)


def draw(theme: str) -> str:
    d = Drawing(THEMES[theme])
    d.box(0.6, 0.6, WIDTH - 1.2, HEIGHT - 1.2, "paper", "paper", 10)
    as_deployed(d)
    in_training(d)
    return d.svg()


if __name__ == "__main__":
    for name in THEMES:
        (FOLDER / f"architecture-{name}.svg").write_text(draw(name), encoding="utf-8")
