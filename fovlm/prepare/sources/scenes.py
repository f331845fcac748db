"""Scenes: pictures with names, placed on real film; a question that needs one of them, and where each of them is.

    "what is in row 1 column 3 ?"  ->  "frog"

IN holds `stamps/stamps.jsonl` ({file, caption, category}; cutouts are PNGs with transparency, and captions like "A
frog." give the names) and `clips/` (videos or animations). A scene has `--objects` pictures in different cells of a
grid of `--grid` x `--grid`, on the frames of one film; in every frame they are in new cells. A scene is asked up to
QUESTIONS times, about different objects: conversations that share its encoded frames. The question:

    name    what is in row 1 column 3 ?              the picture at a place. The names are NAMES.
    place   where is the frog ?                      the other way round
    left    what is left of the frog ?               the picture in the cell beside another
    kind    what kind of thing is in row 1 column 3 ?  its category; pictures have any name, and validation others

With several frames the question ends in "in frame 2 ?". `--held-out` takes the films, and for `kind` the names, that a
set made without it never has; with `--pictures N` also, of each name, the picture behind the first N of the table.
Records hold `objects` [{name, kind, boxes}], a box [left, top, right, bottom] in pixels for each frame, and for each
conversation the `asked` object and `frame`. A seed gives the same bytes every time.
"""

import functools
import json
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fovlm.data.tables import Row
from fovlm.data.tokenizers import word_tokenizer
from fovlm.errors import SampleError, UserError, few
from fovlm.media import tolerant
from fovlm.media.collage import load_cutout, place
from fovlm.media.encode import encode_jpeg
from fovlm.prepare.frames import SUFFIXES
from fovlm.prepare.job import Job, NewSample, RawSource, SceneSettings

NAMES = (
    "frog", "butterfly", "elephant", "giraffe", "penguin", "tiger", "zebra", "owl", "banana", "strawberry", "carrot",
    "pineapple", "airplane", "teapot", "violin", "basketball",
)  # fmt: skip
KINDS = {"animals": "animal", "food": "food", "town": "building", "household": "tool"}
WORDS = "what where is in of the left kind thing row column frame ?"
QUESTIONS = 4  # of a scene
FILM_FRAMES = 12  # of a film, at two a second, that scenes use
MARGIN = 0.1  # of a cell, around its picture
NAME = re.compile(r"(?:An?|Some|The) ([a-z]+)\.")


@dataclass(frozen=True)
class Library:
    """The pictures by name, their kinds, and the films of one job."""

    cutouts: dict[str, list[np.ndarray]]  # u8 [h, w, 4] each
    kinds: dict[str, str]
    films: list[Path]


def settings(job: Job) -> SceneSettings:
    """What to draw."""
    return job.scenes or SceneSettings()


def counts(drawn: SceneSettings) -> list[int]:
    """The numbers of pictures that a scene may have. Raises UserError."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", drawn.objects):
        raise UserError(f"--objects {drawn.objects}: numbers with commas between them, like 1,3,9")
    found = [int(number) for number in drawn.objects.split(",")]
    if max(found) > drawn.grid**2:
        raise UserError(f"--objects {max(found)}: a grid of {drawn.grid} has {drawn.grid**2} cells (--grid)")
    return found


def held_out(name: str) -> bool:
    """Whether a name or a film belongs to validation alone: about one in six."""
    return zlib.crc32(name.encode()) % 6 == 0


@functools.lru_cache(maxsize=1)
def library(job: Job) -> Library:
    """The pictures and films of a job. Raises UserError when some are missing."""
    drawn, table = settings(job), job.raw / "stamps" / "stamps.jsonl"
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{table}: scenes need this table of pictures ({error})") from error
    cutouts: dict[str, list[np.ndarray]] = defaultdict(list)
    kinds, first = {}, drawn.pictures or 0 if drawn.held_out else 0
    needed = first + 1 if drawn.held_out else drawn.pictures or 1
    for row in rows:
        match = NAME.fullmatch(row["caption"])
        name = match[1] if match else ""
        wanted = row["category"] in KINDS and held_out(name) == drawn.held_out if drawn.ask == "kind" else name in NAMES
        if match and wanted and len(cutouts.get(name, ())) < needed:
            cutout = load_cutout(table.parent / row["file"], job.size // drawn.grid)
            if cutout is not None:
                cutouts[name].append(cutout)
                kinds[name] = KINDS.get(row["category"], "")
    cutouts = {name: found[first:] for name, found in cutouts.items() if len(found) == needed}
    files = sorted(f for f in (job.raw / "clips").glob("*") if f.suffix.lower() in SUFFIXES)
    films = [f for f in files if held_out(re.sub(r"-\d+$", "", f.stem)) == drawn.held_out]  # cuts of a film together
    if missing := [name for name in NAMES if name not in cutouts] if drawn.ask != "kind" else []:
        raise UserError(f"{table}: fewer than {needed} cutouts named {few(missing)} (--pictures)")
    if len(cutouts) < max(counts(drawn)) or not films:
        raise UserError(f"{job.raw}: {len(cutouts)} names with {needed} cutouts and {len(films)} films are too few")
    return Library(cutouts, kinds, films)


@functools.lru_cache(maxsize=512)
def film(file: Path, size: int) -> np.ndarray:
    """The first frames of a film u8 [f, size, size, 3], two a second. Raises SampleError."""
    try:
        with open(file, "rb") as data:
            if (kind := tolerant.kind_of(data)) is None:
                raise SampleError("not a video")
            frames = tolerant.decode_some(data, kind, size, FILM_FRAMES, fps=2).frames
    except OSError as error:
        raise SampleError("unreadable file") from error
    return frames.permute(0, 2, 3, 1).numpy()


def cell_name(cell: int, grid: int) -> str:
    """Cells are numbered by row; names count from 1."""
    return f"row {cell // grid + 1} column {cell % grid + 1}"


def make(row: Row, job: Job) -> NewSample:
    """The questions of one scene."""
    drawn, stock = settings(job), library(job)
    rng = np.random.default_rng([job.seed, drawn.held_out, row["scene"]])
    count = int(rng.choice(counts(drawn)))
    names = [str(name) for name in rng.choice(sorted(stock.cutouts), count, replace=False)]
    choices = [stock.cutouts[name] for name in names]
    cutouts = [found[rng.integers(len(found)) if len(found) > 1 else 0] for found in choices]
    reel = film(stock.films[rng.integers(len(stock.films))], job.size)
    start = int(rng.integers(max(1, len(reel) - drawn.frames + 1)))
    cells = np.array([rng.permutation(drawn.grid**2)[:count] for _ in range(drawn.frames)])  # [frames, objects]
    side = job.size / drawn.grid
    boxes: list[list[list[int]]] = [[] for _ in names]
    pictures = []
    for n, places in enumerate(cells):
        frame = reel[min(start + n, len(reel) - 1)].copy()
        for cutout, cell, track in zip(cutouts, places, boxes, strict=True):
            pixels = round(side * (1 - MARGIN) * rng.uniform(0.8, 1))
            center = ((cell % drawn.grid + 0.5) * side, (cell // drawn.grid + 0.5) * side)
            track.append(place(frame, cutout, center, pixels, rng.uniform(-15, 15)))
        pictures.append(encode_jpeg(frame, job.quality))
    objects = [
        {"name": name, "kind": stock.kinds[name], "boxes": track} for name, track in zip(names, boxes, strict=True)
    ]
    conversations = []
    for target in rng.permutation(count):
        shown = int(rng.integers(drawn.frames))
        if found := _question(drawn.ask, names, stock.kinds, cells[shown], int(target), drawn.grid):
            when = f"in frame {shown + 1} ?" if drawn.frames > 1 else "?"
            texts = {"user": f"{found[0]} {when}", "assistant": found[1]}
            conversations.append(texts | {"asked": int(target), "frame": shown})
    record = {"conversations": conversations[:QUESTIONS], "objects": objects, "source": f"scenes/{count}"}
    return NewSample(record if conversations else {}, pictures, still=drawn.frames == 1)


def _question(
    ask: str, names: list[str], kinds: dict[str, str], cells: np.ndarray, target: int, grid: int
) -> tuple[str, str] | None:
    """The question about an object and its answer; None where there is none (nothing is beside it)."""
    name, where = names[target], cell_name(int(cells[target]), grid)
    if ask == "left":
        beside = [i for i, cell in enumerate(cells) if cell == cells[target] + 1 and cell % grid]
        return (f"what is left of the {names[beside[0]]}", name) if beside else None
    if ask == "kind":
        return f"what kind of thing is in {where}", kinds[name]
    return {"name": (f"what is in {where}", name), "place": (f"where is the {name}", where)}[ask]


def finish(job: Job) -> None:
    """Write a tokenizer with the words of all questions and answers, for language models from scratch."""
    word_tokenizer([*WORDS.split(), *map(str, range(10)), *NAMES, *KINDS.values()]).save_pretrained(
        job.out / "tokenizer"
    )


def rows(job: Job) -> list[dict[str, Any]]:
    """The numbers of the scenes. Raises UserError."""
    library(job)
    return [{"scene": n} for n in range(settings(job).samples)]


SOURCE = RawSource("scenes", "image", (), (), (), make, rows=rows, finish=finish)
