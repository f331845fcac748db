"""The synthetic task: find the object that the question names in every frame, and read its mark.

    "what does the red gate show?"  ->  "3 1 5 0"

Every frame is a grid of patches. An object fills one patch: its rim is its name (a colour and a shape), the digit in
its middle is its mark. Objects change places and marks from frame to frame, so the answer must be looked up in every
frame, and the gaze must follow the object rather than a place. With enough objects one token cannot hold all marks of a
frame: then a model that looks where the question points does better than one whose look is always the same.

`make` writes shards, tokenizer and the places of the asked objects below FOVLM_DATA, once, from the settings and the
seed alone. `train/synthetic_score.py` scores a model on it. Letters: C clips, f frames of a clip, G patches on a side,
O objects, p pixels of a patch.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from fovlm.config.schema import SyntheticTask
from fovlm.data.shards import write_shards
from fovlm.data.tokenizers import word_tokenizer
from fovlm.errors import UserError
from fovlm.fileio import locked, remove_unfinished, staged_dir
from fovlm.media.encode import encode_jpeg
from fovlm.paths import data_root

COLOURS = {
    "red": (230, 30, 30), "green": (20, 200, 40), "blue": (40, 70, 255), "yellow": (240, 220, 0),
    "cyan": (0, 220, 230), "pink": (250, 50, 220), "white": (250, 250, 250), "orange": (250, 130, 0),
}  # fmt: skip
# The painted sides of the rim: left, right, top, bottom.
SHAPES = {"square": (1, 1, 1, 1), "gate": (1, 1, 0, 0), "bridge": (0, 0, 1, 1)}
# Digits, 4 columns by 5 rows, one hexadecimal digit a row.
DIGITS = ("69996", "26227", "6924f", "e161e", "99f11", "f8e1e", "68e96", "f1244", "69696", "69716")
GROUND = 30  # grey level of an empty patch
QUESTION = "what does the {name} show?"
PER_SHARD = 1000
TRUTH = "truth.json"  # where the asked object is in every frame of every validation clip
COUNT = "count {many} from {first}"  # the text-only task
NUMBERS = {3: "three", 4: "four", 5: "five"}


def folder(task: SyntheticTask) -> Path:
    """Where the task's files are."""
    return data_root() / task.folder


def make(task: SyntheticTask) -> None:
    """Write the shards video, image, text and val, the tokenizer and the truth, unless the same ones exist.

    Of two runs that start at once, one writes and the other waits. Raises UserError when the folder has other files.
    """
    target, settings = folder(task), task.model_dump_json(indent=1)
    record = target / "task.json"
    if record.exists() and record.read_text() == settings:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(target.name + ".lock")):
        if record.exists() and record.read_text() == settings:
            return
        if target.exists() and not record.exists():
            raise UserError(f"data.generate.folder: {target} has other files in it: choose another folder")
        remove_unfinished(target)
        with staged_dir(target) as staging:
            _write(task, staging)
            (staging / record.name).write_text(settings)
            shutil.rmtree(target, ignore_errors=True)


def _write(task: SyntheticTask, target: Path) -> None:
    clips = task.train_clips
    others = 1 - task.text_fraction - task.image_fraction
    pictures, texts = (round(clips * share / max(others, 0.1)) for share in (task.image_fraction, task.text_fraction))
    write_shards(target / "video-%03d.tar", _videos(task, "clip", clips, task.frames, task.objects, 1), PER_SHARD)
    write_shards(target / "image-%03d.tar", _videos(task, "image", pictures, 1, task.objects, 2), max(pictures, 1))
    write_shards(target / "text-%03d.tar", _texts(task, texts), max(texts, 1))
    truth: dict[str, list[int]] = {}
    crowd = [max(task.objects)]  # validation has the hardest clips only
    write_shards(target / "val-%03d.tar", _videos(task, "val", task.val_clips, task.frames, crowd, 3, truth), 10**6)
    pictured = _videos(task, "val_image", task.val_clips, 1, crowd, 5, truth)
    write_shards(target / "val_image-%03d.tar", pictured, 10**6)
    tokenizer(task).save_pretrained(target / "tokenizer")
    (target / TRUTH).write_text(json.dumps(truth))


def tokenizer(task: SyntheticTask) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of the task and no others."""
    words = [*QUESTION.split(), *COLOURS, *SHAPES, *map(str, range(10)), *COUNT.split(), *NUMBERS.values()]
    return word_tokenizer(words)


def _videos(
    task: SyntheticTask, kind: str, count: int, frames: int, objects: list[int], stream: int, truth: dict | None = None
) -> Iterator[dict[str, Any]]:
    """Samples with `frames` numbered JPEGs, or one picture; `truth` gets the cells of the asked object."""
    object_names = names(task.names)
    rng = np.random.default_rng([task.seed, stream])
    for start in range(0, count, PER_SHARD):  # at most this many clips in memory
        part = generate(task, rng, min(PER_SHARD, count - start), frames, objects)
        for i in range(len(part.frames)):
            key = f"{kind}{start + i:06d}"
            record = {
                "user": QUESTION.format(name=object_names[part.asked[i]]),
                "assistant": " ".join(map(str, part.marks[i])),
                "source": f"hunt/{kind}",
            }
            pictures = [encode_jpeg(frame) for frame in part.frames[i]]
            one = kind.endswith("image")
            named = {"jpg": pictures[0]} if one else {f"{n:03d}.jpg": p for n, p in enumerate(pictures)}
            if truth is not None:
                truth[key] = part.cell[i].tolist()
            yield {"__key__": key, "json": record, **named}


def _texts(task: SyntheticTask, count: int) -> Iterator[dict[str, Any]]:
    """Text-only samples: count on from a number, modulo the number of marks."""
    rng = np.random.default_rng([task.seed, 4])
    for i in range(count):
        many, first = int(rng.integers(3, 6)), int(rng.integers(task.marks))
        answer = " ".join(str((first + n) % task.marks) for n in range(many))
        asked = COUNT.format(many=NUMBERS[many], first=first)
        yield {"__key__": f"text{i:06d}", "json": {"user": asked, "assistant": answer, "source": "hunt/text"}}


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
        sides = (body[:, :rim], left), (body[:, -rim:], right), (body[:rim], top), (body[-rim:], bottom)
        for pixels, painted in sides:
            if painted:
                pixels[:] = COLOURS[colour]
        for m in range(marks):
            out[1 + n * marks + m] = body
            inner = out[1 + n * marks + m, rim:-rim, rim:-rim]
            inner[glyph(m, *inner.shape[:2])] = 255
    return out


def glyph(digit: int, height: int, width: int) -> np.ndarray:
    """A digit scaled to the area -> bool [height, width]."""
    rows = np.array([[int(row, 16) >> (3 - c) & 1 for c in range(4)] for row in DIGITS[digit]], bool)
    y, x = np.arange(height) * 5 // height, np.arange(width) * 4 // width
    return rows[y][:, x]


def generate(task: SyntheticTask, rng: np.random.Generator, clips: int, f: int, counts: list[int]) -> Clips:
    """Draw `clips` clips of f frames. Each has one of the `counts` of objects, with different names; in every frame
    they are in new places and show new marks."""
    grid, p, most = task.grid, task.patch, max(counts)
    objects = rng.choice(np.array(counts), clips)
    who = rng.random((clips, task.names)).argsort(1)[:, :most]  # distinct names of each clip; the first is asked for
    cells = rng.random((clips, f, grid * grid)).argsort(2)[:, :, :most]
    shown = rng.integers(0, task.marks, (clips, f, most))
    sprite = 1 + who[:, None, :] * task.marks + shown
    sprite[np.broadcast_to(np.arange(most) >= objects[:, None, None], sprite.shape)] = 0
    canvas = np.zeros((clips, f, grid * grid), np.int64)
    np.put_along_axis(canvas, cells, sprite, 2)
    pictures = sprites(task.names, task.marks, p)[canvas].reshape(clips, f, grid, grid, p, p, 3)
    frames = pictures.transpose(0, 1, 2, 4, 3, 5, 6).reshape(clips, f, grid * p, grid * p, 3)
    return Clips(frames, who[:, 0], shown[:, :, 0], cells[:, :, 0], objects)
