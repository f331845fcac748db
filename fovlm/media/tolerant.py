"""Fault-tolerant decoding of files that users supply (videos, animations, pictures), and cameras.

Where `decode.py` refuses a broken sample, this decodes as much as possible and notes what is missing. The format comes
from the first bytes; FFmpeg never guesses it (it would guess playlists that open other files).
"""

import io
import math
import struct
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fovlm.errors import SampleError
from fovlm.media.decode import (
    PICTURE_ERRORS,
    PICTURES,
    SEEK_AFTER,
    VIDEO_ERRORS,
    decode_pictures,
    decoder_errors,
    fit,
    fit_frame,
    opaque,
    read_pixels,
    refuse_absurd,
    refuse_absurd_tables,
    spread,
    video_stream,
)

MAGIC = (  # offset, first bytes, Pillow's name of the picture format or FFmpeg's name of the container
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WEBP"),
    *((4, atom, "mp4") for atom in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
    (0, b"FLV", "flv"),
    (0, b"OggS", "ogg"),
)
ANIMATIONS = ("WEBP", "GIF")
STILLS = (*PICTURES.values(), "GIF")  # kinds that Pillow reads
ORIENTATION = 0x0112  # Exif 2.32, table 4: 1 is upright, 2 to 8 are turned or mirrored
LATE = 0.2  # seconds that a frame may be older than the packet due at that time; beyond, the packet counts as lost
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
Progress = Callable[[int, int], None] | None  # called with (frames done, frames in all)


class Decoded(NamedTuple):
    """What could be decoded of a file."""

    frames: Tensor  # u8 [f, 3, size, size], f >= 1
    seconds: list[float]  # when each frame is on screen, from the start of the video
    note: str  # what could not be decoded, or nothing
    still: bool = False  # one picture, not a video


def kind_of(file: BinaryIO) -> str | None:
    """Pillow's or FFmpeg's name of a file's format by its first bytes, or None; leaves the file at its start."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    return next((kind for offset, magic, kind in MAGIC if head[offset:].startswith(magic)), None)


def decode_some(
    file: BinaryIO, kind: str, size: int, most: int, fps: float = 1.0, on_progress: Progress = None
) -> Decoded:
    """A video, animation or picture of a kind that `kind_of` found -> the frames that decode.

    `fps` frames a second, or `most` evenly spaced ones of a longer video; each is the one on screen at that time.
    Damaged or missing parts are left out and noted. Raises SampleError when nothing decodes.
    """
    if kind in STILLS:
        if kind in ANIMATIONS:
            decoded = _decode_animation(file, kind, size, most, fps)
        else:
            extension = next(e for e, name in PICTURES.items() if name == kind)
            decoded = Decoded(decode_pictures([(extension, file.read())], size), [0.0], "", still=True)
        return decoded._replace(frames=_upright(decoded.frames, file, kind))
    with decoder_errors("undecodable video", VIDEO_ERRORS):
        return _decode_damaged(file, kind, size, most, fps, on_progress)


def pixels_of(image: Image.Image) -> np.ndarray:
    """A picture in memory -> u8 [h, w, 3], upright, and on white where it is transparent, like one from a file."""
    return opaque(ImageOps.exif_transpose(image))


def _upright(frames: Tensor, file: BinaryIO, kind: str) -> Tensor:
    """Square frames u8 [f, 3, s, s] rotated as the Exif orientation says: phones store how they were held."""
    file.seek(0)
    try:
        with Image.open(file, formats=[kind]) as image:
            turn = image.getexif().get(ORIENTATION, 1)
    except (Image.DecompressionBombWarning, *PICTURE_ERRORS, struct.error):
        return frames  # the pixels decode, their metadata doesn't
    if turn in (5, 6, 7, 8):  # rows and columns are swapped
        frames = frames.transpose(2, 3)
    flips = [dim for dim, turns in ((2, (3, 4, 7, 8)), (3, (2, 3, 6, 7))) if turn in turns]
    return frames.flip(flips).contiguous()


def _decode_damaged(file: BinaryIO, kind: str, size: int, most: int, fps: float, on_progress: Progress) -> Decoded:
    refuse_absurd_tables(file)
    with av.open(file, format=kind) as container:
        stream = video_stream(container)
        stamps, claimed = _stamps(container, stream), _claimed_seconds(container, stream)
        announced = stream.frames  # by the header; 0 where it says nothing
    if not stamps:
        raise SampleError("video without frames")
    start, length = stamps[0], stamps[-1] - stamps[0]
    lasts = length * len(stamps) / max(len(stamps) - 1, 1)  # including the display time of the last frame
    wanted = [n / fps for n in spread(int(length * fps) + 1, most)]
    frames, seconds = [], []
    file.seek(0)
    with av.open(file, format=kind) as container:
        stream = video_stream(container)
        for n, frame in _frames_left(container, stream, [start + at for at in wanted], stamps):
            frames.append(_upright_frame(frame, size))
            seconds.append(wanted[n])
            if on_progress:
                on_progress(n + 1, len(wanted))
    if not frames:
        raise SampleError("undecodable video")
    notes = []
    if claimed > lasts + 1 and not 0 < announced <= len(stamps):  # the last frame may be shown longer than others
        notes.append(f"the file is cut short: read {lasts:.0f} of {claimed:.0f} seconds")
    if len(frames) < len(wanted):
        notes.append(f"{len(wanted) - len(frames)} of {len(wanted)} frames are damaged and left out")
    return Decoded(torch.from_numpy(np.stack(frames)), seconds, "; ".join(notes))


def _stamps(container, stream) -> list[float]:
    """The times of all readable packets, rising; decodes nothing."""
    stamps = []
    with suppress(av.FFmpegError):  # the rest of the file is missing; the caller compares with the header's claim
        for packet in container.demux(stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None and not packet.is_discard:
                stamps.append(float(stamp * packet.time_base))
    return sorted(stamps)


def _claimed_seconds(container, stream) -> float:
    """The length of the video by its header, 0 if unknown. The container's own duration includes the sound."""
    shown = None if stream.duration is None else float(stream.duration * stream.time_base)
    if stream.frames and stream.average_rate:
        stored = float(stream.frames / stream.average_rate)
        return stored if shown is None else min(stored, shown)  # a trimmed video stores more than it shows
    if shown is not None:
        return shown
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def _frames_left(container, stream, wanted: list[float], stamps: list[float]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number of the wanted time, frame on screen) for each whose frame decodes."""
    decoder = _decode_left(container, stream)
    shown, following = None, next(decoder, None)
    for n, at in enumerate(wanted):
        if n and at - wanted[n - 1] > SEEK_AFTER:
            container.seek(int(at / stream.time_base), stream=stream)  # to the key frame before
            decoder = _decode_left(container, stream)
            shown, following = None, next(decoder, None)
        while following is not None and following.time <= at + 1e-6:
            shown, following = following, next(decoder, None)
        due = stamps[bisect_right(stamps, at + 1e-6) - 1]
        if shown is not None and shown.time > due - LATE:
            yield n, shown


def _decode_left(container, stream) -> Iterator[av.VideoFrame]:
    """All frames that decode, skipping damaged packets, up to the end of the file."""
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            return
        except av.InvalidDataError:
            continue
        except av.FFmpegError:
            return
        yield from (frame for frame in frames if frame.pts is not None and not frame.is_corrupt)


def _upright_frame(frame: av.VideoFrame, size: int) -> np.ndarray:
    """u8 [3, size, size], rotated as the video's metadata says."""
    return np.rot90(fit_frame(frame, size), frame.rotation // 90).transpose(2, 0, 1)


def camera(source: str, size: int, fps: float = 1.0) -> Iterator[Tensor]:
    """The newest frame of a camera, u8 [3, size, size], `fps` times a second.

    `source` is a camera's number (0 is the first), or a video file that is played in its place.
    Raises SampleError, with one line, for a camera that is not there.
    """
    format, name = CAMERAS.get(sys.platform, CAMERAS["linux"])
    live = source.isdigit() or source.startswith("/dev/")
    try:
        if live:
            container = av.open(name.format(source) if source.isdigit() else source, format=format)
        else:
            with open(source, "rb") as file:
                kind = kind_of(file)
            if kind is None or kind in STILLS:
                raise SampleError(f"{source} is neither a video nor a camera; cameras are numbered from 0")
            container = av.open(source, format=kind)
    except SampleError:
        raise
    except (*VIDEO_ERRORS, OSError) as error:
        what, why = "camera" if live else "video", getattr(error, "strerror", None) or error
        raise SampleError(f"no {what} {source} ({why}); cameras are numbered from 0") from error
    with container:
        stream, due = video_stream(container), -1.0
        for frame in _decode_left(container, stream):
            now = time.monotonic() if live else frame.time
            if now >= due:
                due = now + 1 / fps - 1e-6
                yield torch.from_numpy(np.ascontiguousarray(_upright_frame(frame, size)))


def _complete(file: BinaryIO, format: str) -> tuple[BinaryIO, bool]:
    """(file, is complete); a truncated WebP is cut to its last whole picture, since libwebp refuses it otherwise."""
    end = file.seek(0, io.SEEK_END)
    if format == "GIF":
        file.seek(max(end - 1, 0))
        complete = file.read(1) == b";"
        file.seek(0)
        return file, complete
    file.seek(0)
    data = bytearray(file.read())
    file.seek(0)
    if int.from_bytes(data[4:8], "little") + 8 <= end:
        return file, True
    at = 12
    while (after := at + 8 + (length := int.from_bytes(data[at + 4 : at + 8], "little")) + length % 2) <= len(data):
        at = after
    data[4:8] = (at - 8).to_bytes(4, "little")
    return io.BytesIO(bytes(data[:at])), False


def _decode_animation(file: BinaryIO, format: str, size: int, most: int, fps: float) -> Decoded:
    """In two passes, since only the first says how long it lasts: a picture may stay for hours."""
    begins: list[float] = []  # when each picture that decodes appears
    ends, moves = 0.0, False
    file, complete = _complete(file, format)
    try:
        for image in _pictures(file, format, most):
            moves = getattr(image, "is_animated", False)
            begins.append(ends)
            milliseconds = image.info.get("duration", 0)
            ends += (milliseconds if milliseconds > 10 else 100) / 1000  # what browsers do without a duration
    except SampleError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("absurd picture size") from error
    except (*PICTURE_ERRORS, IndexError, struct.error):
        complete = False
    if not begins:
        raise SampleError("undecodable picture")
    # Like a video's last frame, the last picture counts at its beginning.
    used = [n / fps for n in spread(math.ceil((begins[-1] + 1e-6) * fps), most)]
    on_screen = [bisect_right(begins, at + 1e-6) - 1 for at in used]
    pictures = zip(range(on_screen[-1] + 1), _pictures(file, format, most), strict=False)
    fitted = {n: fit(read_pixels(image, size), size).transpose(2, 0, 1) for n, image in pictures if n in on_screen}
    note = "" if complete else f"the file is cut short or damaged: read {len(begins)} pictures, {ends:.1f} seconds"
    return Decoded(torch.from_numpy(np.stack([fitted[n] for n in on_screen])), used, note, not moves)


def _pictures(file: BinaryIO, format: str, most: int) -> Iterator[Image.Image]:
    """The pictures of an animation, each valid until the next; only the first one when `most` is 1."""
    file.seek(0)
    with Image.open(file, formats=[format]) as image, suppress(EOFError):  # Pillow's sign of the end
        refuse_absurd(*image.size)
        for number in range(1 if most == 1 else sys.maxsize):
            image.seek(number)
            image.load()
            yield image
