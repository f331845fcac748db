"""Raw videos and pictures -> the JPEGs of a sample: one frame a second, short side to size, center crop."""

import io
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from fovlm.errors import SampleError
from fovlm.media import tolerant
from fovlm.media.encode import encode_jpeg
from fovlm.prepare.job import Job

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".webp", ".gif")  # tried for a video named without one
NO_VIDEO = "no such video file"
FOLDERS = ("", "video", "videos", "video_folder", "clips")  # folders of the raw data that may hold the videos


def find_video(name: object, job: Job) -> Path:
    """The file of a video by its name in a row, with or without suffix. Raises SampleError."""
    relative = Path(str(name))
    if relative.is_absolute() or ".." in relative.parts:
        raise SampleError("the video's path leads out of the folder")
    suffixes = ("",) if relative.suffix.lower() in SUFFIXES else ("", *SUFFIXES)
    for folder in video_folders(job):
        for suffix in suffixes:
            file = folder / relative
            file = file.with_name(file.name + suffix)
            if _is_file(file):
                return file
    raise SampleError(NO_VIDEO)


def video_folders(job: Job) -> list[Path]:
    """The folders in which the videos of a job are looked for, in order."""
    return [job.videos] if job.videos is not None else [job.folder / name for name in FOLDERS]


def video_frames(file: Path, job: Job) -> list[bytes]:
    """The JPEGs of a video or animation. Raises SampleError, also for an incomplete one."""
    try:
        with open(file, "rb") as data:
            if (kind := tolerant.kind_of(data)) is None:
                raise SampleError("not a video")
            return _decode(data, kind, job, job.max_frames, "video cut short or damaged")
    except OSError as error:
        raise SampleError("unreadable file") from error


def picture(image: Any, job: Job) -> bytes:
    """The JPEG of a picture in a table: {bytes, path}, bytes, or a path below the raw data. Raises SampleError."""
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
    if (kind := tolerant.kind_of(file)) not in tolerant.STILLS:
        raise SampleError("not a picture")
    return _decode(file, kind, job, 1, "undecodable picture")[0]


def _decode(file: BinaryIO, kind: str, job: Job, max_frames: int, incomplete: str) -> list[bytes]:
    """JPEGs of a file that decodes completely. Raises SampleError(incomplete) otherwise."""
    decoded = tolerant.decode_some(file, kind, job.size, max_frames)
    if decoded.note:
        raise SampleError(incomplete)
    return jpegs(decoded.frames, job)


def jpegs(frames: Tensor, job: Job) -> list[bytes]:
    """u8 [f, 3, size, size] -> JPEGs."""
    return [encode_jpeg(frame.permute(1, 2, 0).numpy(), job.quality) for frame in frames]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for a file, a folder without read permission
        return False
