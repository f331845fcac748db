"""Any file that a user names, as frames: a video, an animation, a picture, or a folder of pictures.

The frames are those of training: one a second, at most `max_frames`, evenly spaced in longer videos. Damaged files give
the frames that decode and a note. Mistakes raise UserError.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fovlm.errors import SampleError, UserError
from fovlm.media import decode, tolerant
from fovlm.media.location import check_path, unreadable

KINDS = "mp4, mov, webm, mkv, avi, mpg, flv, ogv; animated webp or gif; jpg, png, webp; or a folder of pictures"


@dataclass
class Clip:
    """Frames and where they come from."""

    frames: Tensor  # u8 [f, 3, size, size], f >= 1
    seconds: list[float]  # when each frame is on screen; of a folder, its number
    name: str
    note: str = ""  # what could not be read
    still: bool = False  # one picture, not a video


def read_clip(
    path: str | Path,
    size: int,
    max_frames: int = 64,
    fps: float = 1.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Clip:
    """Decode a video, animation, picture or folder of pictures into at most `max_frames` frames of `size` pixels.

    `fps` frames are taken a second (training takes one). The pictures of a folder are frames in natural order (2 before
    10). `on_progress(done, total)` is called after each frame of a video. Raises UserError when the path does not exist
    or nothing in it can be decoded.
    """
    path = check_path(path)
    try:
        if path.is_dir():
            return _read_folder(path, size, max_frames)
        return _read_file(path, size, max_frames, fps, on_progress)
    except OSError as error:
        raise unreadable(path, error) from error


def _read_file(
    path: Path, size: int, max_frames: int, fps: float, on_progress: Callable[[int, int], None] | None
) -> Clip:
    with path.open("rb") as file:
        kind = tolerant.kind_of(file)
        if kind is None:
            what = "is no video or picture" if path.stat().st_size else "is empty"
            raise UserError(f"{path} {what} (supported: {KINDS})")
        try:
            decoded = tolerant.decode_some(file, kind, size, max_frames, fps, on_progress)
        except SampleError as error:
            raise UserError(f"{path}: {_explained(str(error), kind)}") from error
    return Clip(decoded.frames, decoded.seconds, path.name, decoded.note, still=decoded.still)


def list_clips(folder: str | Path) -> list[Path]:
    """What `read_clip` supports in a folder, in natural order: files, by their first bytes, and folders of pictures.

    Pictures whose names differ in numbers alone are the frames of one clip: the folder itself. Raises UserError, and
    OSError for what must not be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = [path for path in sorted(folder.iterdir(), key=_natural) if _is_clip(path)]
    if not found:
        raise UserError(f"{folder} holds no video or picture (supported: {KINDS})")
    numbered = {re.sub(r"\d+", "", path.name) for path in found}
    return [folder] if len(found) > len(numbered) == 1 and _kind(found[0]) in decode.PICTURES.values() else found


def _is_clip(path: Path) -> bool:
    return any(_kind(p) in decode.PICTURES.values() for p in path.iterdir()) if path.is_dir() else bool(_kind(path))


def _kind(path: Path) -> str | None:
    """The kind of a file; None for what is no video or picture."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return tolerant.kind_of(file)


def _explained(cause: str, kind: str | None) -> str:
    """The message for a SampleError's cause."""
    if cause == "undecodable video" and kind == "mp4":
        return "nothing in this video decodes; an interrupted recording has lost its index and needs repair"
    return {
        "undecodable video": "nothing in this video decodes: the file is damaged",
        "undecodable picture": "this picture does not decode: the file is damaged",
        "video without frames": "no pictures in it: it has only sound or is cut off before the first frame",
        "absurd picture size": f"its header claims over {decode.MAX_PIXELS // 1_000_000} million pixels, the limit",
    }.get(cause, cause)


def _read_folder(folder: Path, size: int, max_frames: int) -> Clip:
    files = sorted((p for p in folder.iterdir() if p.suffix[1:].lower() in decode.PICTURES), key=_natural)
    if not files:
        raise UserError(f"{folder} holds no pictures ({', '.join(decode.PICTURES)}); for a video, name its file")
    frames, seconds, causes = [], [], []
    for n in decode.spread(len(files), max_frames):
        try:
            with files[n].open("rb") as file:
                kind = tolerant.kind_of(file) or ""
                decoded = tolerant.decode_some(file, kind if kind in decode.PICTURES.values() else "JPEG", size, 1)
        except (SampleError, OSError) as error:
            causes.append(f"{files[n].name}: {_explained(str(error), None)}")
            continue
        frames.append(decoded.frames)
        seconds.append(float(n))
    if not frames:
        raise UserError(f"no picture in {folder} decodes, the first is {causes[0]}")
    note = f"{len(causes)} of {len(frames) + len(causes)} pictures left out, the first is {causes[0]}" if causes else ""
    return Clip(torch.cat(frames), seconds, folder.name or str(folder.resolve()), note)


def _natural(path: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name.lower())]
