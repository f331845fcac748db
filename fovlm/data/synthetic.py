"""The embedded task: find the object that the question names in every frame, and read its mark.

    "what does the red gate show?"  ->  "3 1 5 0"

Every frame is a grid of patches. An object fills one patch: its rim is its name (a colour and a shape), the digit in
its middle is its mark. From frame to frame objects change places and marks, so that the answer must be looked up in
every frame, and the gaze must follow the object and not the place. With enough objects one token cannot hold all marks
of a frame: then a model that looks where the question points does better than one whose look is always the same.

Everything is a pure function of the settings and the seed. Letters: C clips, f frames of a clip, G patches on a side,
O objects, p pixels of a patch.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (230, 30, 30), "green": (20, 200, 40), "blue": (40, 70, 255), "yellow": (240, 220, 0),
    "cyan": (0, 220, 230), "pink": (250, 50, 220), "white": (250, 250, 250), "orange": (250, 130, 0),
}  # fmt: skip
# Which sides of the rim are painted: left, right, top, bottom.
SHAPES = {"square": (1, 1, 1, 1), "gate": (1, 1, 0, 0), "bridge": (0, 0, 1, 1)}
# Digits, 4 columns by 5 rows, one hexadecimal figure a row.
DIGITS = ("69996", "26227", "6924f", "e161e", "99f11", "f8e1e", "68e96", "f1244", "69696", "69716")
GROUND = 30  # grey level of an empty patch
QUESTION = "what does the {name} show?"


@dataclass
class Clips:
    """C clips of f frames. `cell` and `marks` belong to the asked object, whose name is `names[asked]`."""

    frames: np.ndarray  # u8 [C, f, G * p, G * p, 3]
    asked: np.ndarray  # i64 [C]
    marks: np.ndarray  # i64 [C, f]
    cell: np.ndarray  # i64 [C, f]: the asked object's patch, row * G + column
    objects: np.ndarray  # i64 [C]


def names(count: int) -> list[str]:
    """The first `count` names: all colours of the first shape, then of the next."""
    return [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS][:count]


def sprites(count: int, marks: int, p: int) -> np.ndarray:
    """Pictures of an empty patch and of every name with every mark -> u8 [1 + count * marks, p, p, 3]."""
    rim = max(1, p // 6)
    out = np.full((1 + count * marks, p, p, 3), GROUND, np.uint8)
    for n, name in enumerate(names(count)):
        colour, shape = name.split()
        left, right, top, bottom = SHAPES[shape]
        body = np.full((p, p, 3), 0, np.uint8)
        if left:
            body[:, :rim] = COLOURS[colour]
        if right:
            body[:, -rim:] = COLOURS[colour]
        if top:
            body[:rim] = COLOURS[colour]
        if bottom:
            body[-rim:] = COLOURS[colour]
        for m in range(marks):
            out[1 + n * marks + m] = body
            inner = out[1 + n * marks + m, rim:-rim, rim:-rim]
            inner[glyph(m, *inner.shape[:2])] = 255
    return out


def glyph(digit: int, height: int, width: int) -> np.ndarray:
    """A digit as large as fits -> bool [height, width]."""
    rows = np.array([[int(row, 16) >> (3 - c) & 1 for c in range(4)] for row in DIGITS[digit]], bool)
    y, x = np.arange(height) * 5 // height, np.arange(width) * 4 // width
    return rows[y][:, x]


def generate(
    rng: np.random.Generator, clips: int, counts: list[int], f: int, grid: int, p: int, name_count: int, marks: int
) -> Clips:
    """Draw `clips` clips of f frames on a grid of `grid` x `grid` patches of p pixels.

    Each clip has one of the `counts` of objects, with different names out of the first `name_count`; in every frame
    they stand in new places and show new marks out of `marks`.
    """
    most = max(counts)
    objects = rng.choice(np.array(counts), clips)
    who = rng.random((clips, name_count)).argsort(1)[:, :most]  # distinct names of each clip; the first is asked for
    cells = rng.random((clips, f, grid * grid)).argsort(2)[:, :, :most]
    shown = rng.integers(0, marks, (clips, f, most))
    sprite = 1 + who[:, None, :] * marks + shown
    sprite[np.broadcast_to(np.arange(most) >= objects[:, None, None], sprite.shape)] = 0
    canvas = np.zeros((clips, f, grid * grid), np.int64)
    np.put_along_axis(canvas, cells, sprite, 2)
    pictures = sprites(name_count, marks, p)[canvas].reshape(clips, f, grid, grid, p, p, 3)
    frames = pictures.transpose(0, 1, 2, 4, 3, 5, 6).reshape(clips, f, grid * p, grid * p, 3)
    return Clips(frames, who[:, 0], shown[:, :, 0], cells[:, :, 0], objects)
