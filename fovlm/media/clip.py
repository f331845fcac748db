"""Whatever a person points at, as frames: a video, an animation, a picture, a folder of pictures.

The frames are those that training takes (one a second, at most `most`, evenly spaced when longer), upright as the
camera was held. Damaged files give what decodes and a note that says how much; a mistake is one line.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fovlm.errors import SampleError, UserError, did_you_mean
from fovlm.media import decode, tolerant

KINDS = "mp4, mov, webm, mkv, avi, mpg, flv, ogv; animated webp or gif; jpg, png, webp; or a folder of pictures"


@dataclass
class Clip:
    """Frames to be looked at, and what they are."""

    frames: Tensor  # u8 [f, 3, size, size], f >= 1
    seconds: list[float]  # when each frame is on screen; of a folder, its number
    name: str
    note: str = ""  # what could not be read, in words
    still: bool = False  # one picture, not a film


def read_clip(
    path: str | Path, size: int, most: int = 64, fps: float = 1.0, told: Callable[[int, int], None] | None = None
) -> Clip:
    """A video, animation, picture or folder of pictures -> frames of `size` pixels, at most `most` of them.

    `fps` frames are taken a second (training takes one). The pictures of a folder come in natural order (2 before 10),
    each a frame. `told` hears how many frames of a video are read, of how many. Raises UserError when the path leads
    nowhere or to nothing that can be seen.
    """
    path = Path(path)
    if "://" in str(path) or str(path).startswith(("http:/", "https:/")):
        raise UserError(f"{path} is an address: download it first and give the file")
    try:
        return _read(path, size, most, fps, told)
    except OSError as error:
        raise UserError(f"{_short(path)} cannot be read: {error.strerror or error}") from error


def _read(path: Path, size: int, most: int, fps: float, told: Callable[[int, int], None] | None) -> Clip:
    if not path.exists():
        if not path.parent.is_dir():
            raise UserError(f"no such folder: {path.parent}")
        raise UserError(f"no such file: {path}{did_you_mean(path.name, (p.name for p in path.parent.iterdir()))}")
    if path.is_dir():
        return _read_folder(path, size, most)
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder")
    try:
        with path.open("rb") as file:
            kind = tolerant.kind_of(file)
            if kind is None:
                what = "is no video or picture" if path.stat().st_size else "is empty"
                raise UserError(f"{path} {what} (what can be read: {KINDS})")
            seen = tolerant.decode_some(file, kind, size, most, fps, told)
    except SampleError as error:
        raise UserError(f"{path}: {_told(str(error), kind)}") from error
    return Clip(seen.frames, seen.seconds, path.name, seen.note, still=seen.still)


def films(folder: str | Path) -> list[Path]:
    """The files of a folder that can be read, by their first bytes, in natural order. Raises UserError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = []
    try:
        for path in sorted((p for p in folder.iterdir() if p.is_file()), key=_natural):
            with path.open("rb") as file:
                if tolerant.kind_of(file):
                    found.append(path)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    if not found:
        raise UserError(f"{folder} holds nothing to watch (what can be read: {KINDS})")
    return found


def _short(path: Path) -> str:
    """A path that one line can tell: a question in the place of a file may be long."""
    return text if len(text := str(path)) <= 100 else f"{text[:100]}..."


def _told(cause: str, kind: str | None) -> str:
    """A countable cause in the words of someone who has one file."""
    if cause == "undecodable video" and kind == "mp4":
        return "nothing in this video decodes; a recording that was broken off has lost its index and needs repair"
    return {
        "undecodable video": "nothing in this video decodes: the file is damaged",
        "undecodable picture": "this picture does not decode: the file is damaged",
        "video without frames": "no pictures in it: only sound, or it is cut off ahead of them",
        "absurd picture size": f"it claims more than {decode.MAX_PIXELS // 1_000_000} million pixels, which is refused",
    }.get(cause, cause)


def _read_folder(folder: Path, size: int, most: int) -> Clip:
    files = sorted((p for p in folder.iterdir() if p.suffix[1:].lower() in decode.PICTURES), key=_natural)
    if not files:
        kinds = ", ".join(decode.PICTURES)
        raise UserError(f"{folder} holds no pictures ({kinds}); a single video is given by its file")
    frames, seconds, causes = [], [], []
    for n in decode.spread(len(files), most):
        try:
            with files[n].open("rb") as file:
                kind = tolerant.kind_of(file) or ""
                seen = tolerant.decode_some(file, kind if kind in decode.PICTURES.values() else "JPEG", size, 1)
        except (SampleError, OSError) as error:
            causes.append(f"{files[n].name}: {_told(str(error), None)}")
            continue
        frames.append(seen.frames)
        seconds.append(float(n))
    if not frames:
        raise UserError(f"no picture in {folder} decodes, the first is {causes[0]}")
    note = f"{len(causes)} of {len(frames) + len(causes)} pictures left out, the first is {causes[0]}" if causes else ""
    return Clip(torch.cat(frames), seconds, folder.name or str(folder.resolve()), note)


def _natural(path: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name.lower())]
