"""Raw videos and pictures -> the JPEGs of a sample: one frame a second, short side to size, the middle square."""

import io
from pathlib import Path
from typing import Any

from torch import Tensor

from fovlm.errors import SampleError
from fovlm.media import decode, encode, tolerant
from fovlm.prepare.job import Job

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".webp", ".gif")  # tried for a video named without one
NO_VIDEO = "no such video file"
BESIDE = ("", "video", "videos", "video_folder", "clips")  # folders under the raw data in which videos are looked for


def find_video(name: object, job: Job) -> Path:
    """The file of a video by the name in its row, with or without its suffix. Raises BadSample."""
    relative = Path(str(name))
    if relative.is_absolute() or ".." in relative.parts:
        raise SampleError("the video's path leads out of the folder")
    for folder in video_folders(job):
        file = folder / relative
        if _is_file(file):
            return file
        if relative.suffix.lower() not in SUFFIXES:
            for suffix in SUFFIXES:
                if _is_file(with_suffix := file.with_name(file.name + suffix)):
                    return with_suffix
    raise SampleError(NO_VIDEO)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for a file, a folder that may not be read
        return False


def video_folders(job: Job) -> list[Path]:
    """Where the videos of a job are looked for, in this order."""
    if job.videos is not None:
        return [job.videos]
    return [job.folder / name for name in BESIDE]


def video_frames(file: Path, job: Job) -> list[bytes]:
    """The JPEGs of a video or animation. Raises BadSample, also for one that is only partly there."""
    try:
        with open(file, "rb") as data:
            kind = tolerant.kind_of(data)
            if kind is None:
                raise SampleError("not a video")
            seen = tolerant.decode_some(data, kind, job.size, job.most)
    except OSError as error:
        raise SampleError("unreadable file") from error
    if seen.note:
        raise SampleError("video cut short or damaged")
    return jpegs(seen.frames, job)


def picture(image: Any, job: Job) -> bytes:
    """The JPEG of a picture as tables hold it: {bytes, path}, bytes, or a path under the raw data. Raises BadSample."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not data and isinstance(image, dict):
        data = image.get("path")
    if isinstance(data, str):
        if Path(data).is_absolute() or ".." in Path(data).parts or not _is_file(job.folder / data):
            raise SampleError("no such picture file")
        try:
            data = (job.folder / data).read_bytes()
        except OSError as error:
            raise SampleError("unreadable file") from error
    if not data or not isinstance(data, bytes):
        raise SampleError("no picture")
    file = io.BytesIO(data)
    kind = tolerant.kind_of(file)
    if kind not in (*decode.PICTURES.values(), "GIF"):
        raise SampleError("not a picture")
    seen = tolerant.decode_some(file, kind, job.size, 1)
    if seen.note:
        raise SampleError("undecodable picture")
    return jpegs(seen.frames, job)[0]


def jpegs(frames: Tensor, job: Job) -> list[bytes]:
    """u8 [f, 3, size, size] -> JPEGs."""
    return [encode.encode_jpeg(frame.permute(1, 2, 0).numpy(), job.quality) for frame in frames]
