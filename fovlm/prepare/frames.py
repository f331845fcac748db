"""Raw videos and pictures -> the JPEGs of a sample: one frame a second, short side to size, center crop."""

import base64
import io
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from fovlm.errors import SampleError
from fovlm.media import tolerant
from fovlm.media.encode import encode_jpeg
from fovlm.prepare.job import Job

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".webp", ".gif")  # tried for a video named without one
NO_VIDEO, NO_PICTURE = "no such video file", "no such picture file"
FOLDERS = ("", "video", "videos", "video_folder", "clips", "images")  # folders of the raw data that may hold the files


def find_file(name: object, job: Job, suffixes: tuple[str, ...] = (), cause: str = NO_PICTURE) -> Path:
    """The file of a video or picture by its name in a row, which may lack one of the suffixes. Raises SampleError."""
    relative = Path(str(name))
    if relative.is_absolute() and job.media is not None and relative.is_relative_to(job.media.absolute()):
        relative = relative.relative_to(job.media.absolute())
    if relative.is_absolute() or ".." in relative.parts:
        raise SampleError("the path leads out of the folder", str(name))
    ends = ("",) if not suffixes or relative.suffix.lower() in suffixes else ("", *suffixes)
    for folder in media_folders(job):
        for end in ends:
            file = folder / relative
            file = file.with_name(file.name + end)
            if _is_file(file):
                return file
    raise SampleError(cause, str(name))


def media_folders(job: Job) -> list[Path]:
    """The folders in which the videos and pictures of a job are looked for, in order."""
    return [job.media] if job.media is not None else [job.folder / name for name in FOLDERS]


def video_frames(video: Path | bytes, job: Job) -> list[bytes]:
    """The JPEGs of a video or animation. Raises SampleError, also for an incomplete one."""
    try:
        with io.BytesIO(video) if isinstance(video, bytes) else open(video, "rb") as data:
            if (kind := tolerant.kind_of(data)) is None:
                raise SampleError("not a video")
            return _decode(data, kind, job, job.max_frames, "video cut short or damaged")
    except OSError as error:
        raise SampleError("unreadable file") from error


def picture(image: Any, job: Job) -> bytes:
    """The JPEG of a picture in a table: {bytes, path}, bytes, or a path. Raises SampleError."""
    data = bytes_or_name(image)
    if isinstance(data, str):
        try:
            data = find_file(data, job).read_bytes()
        except OSError as error:
            raise SampleError("unreadable file") from error
    if not data:
        raise SampleError("no picture")
    file = io.BytesIO(data)
    if (kind := tolerant.kind_of(file)) not in tolerant.STILLS:
        raise SampleError("not a picture")
    return _decode(file, kind, job, 1, "undecodable picture")[0]


def bytes_or_name(value: Any) -> bytes | str:
    """The content of a picture or video in a table, or the name of its file: {bytes, path}, {url}, bytes or a string,
    which may hold the content (`data:...;base64,`). b"" for anything else. Raises SampleError for a URL."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError as error:
            raise SampleError("malformed data: URL") from error
    if isinstance(value, str) and value.startswith(("http://", "https://", "s3://")):
        raise SampleError("a URL in place of a file", value)
    return value if isinstance(value, bytes | str) else b""


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
