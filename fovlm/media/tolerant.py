"""Footage that people bring: videos, animations and pictures of any make, damaged or not, and cameras.

Where `media.py` refuses a broken sample, this takes what decodes and says how much that is. The format is told by the
first bytes, and FFmpeg is never left to guess (it would guess playlists that open other files).
"""

import io
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
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fovlm.errors import SampleError
from fovlm.media.decode import (
    PICTURES,
    SEEK_AFTER,
    decode_pictures,
    fit,
    opaque,
    refuse_absurd,
    short_side,
    spread,
    video_stream,
)

MAGIC = (  # offset, bytes, Pillow's name of a picture's format or FFmpeg's of a container, for files that people name
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
ORIENTATION = 0x0112  # Exif 2.32, table 4: 1 is upright, 2 to 8 are turned or mirrored
Told = Callable[[int, int], None] | None  # hears how many frames are read, of how many
LATE = 0.2  # seconds that a shown frame may be older than the packet that belongs there; beyond, that packet is lost
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}


class Seen(NamedTuple):
    """What could be read of a file."""

    frames: Tensor  # u8 [f, 3, size, size], f >= 1
    seconds: list[float]  # when each frame is on screen, from the start of the video
    note: str  # what could not be read, or nothing
    still: bool = False  # one picture, not a film


def kind_of(file: BinaryIO) -> str | None:
    """Pillow's or FFmpeg's name of a file's format by its first bytes, or None; leaves the file at its start."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    return next((kind for offset, magic, kind in MAGIC if head[offset:].startswith(magic)), None)


def decode_some(file: BinaryIO, kind: str, size: int, most: int, fps: float = 1.0, told: Told = None) -> Seen:
    """A person's video, animation or picture of the kind that `kind_of` tells -> the frames that decode.

    `fps` frames a second, or `most` evenly spaced ones of a longer video; each is the one on screen at that time. What
    is damaged or cut off is left out and told in the note. Raises BadSample when there is nothing to see.
    """
    if kind in ("JPEG", "PNG", "WEBP", "GIF"):
        read = _decode_animation if kind in ("WEBP", "GIF") else _decode_picture
        seen = read(file, kind, size, most, fps)
        return seen._replace(frames=_upright(seen.frames, file, kind))
    try:
        return _decode_damaged(file, kind, size, most, fps, told)
    except (av.FFmpegError, ValueError) as error:
        raise error if isinstance(error, SampleError) else SampleError("undecodable video") from error


def pixels_of(image: Image.Image) -> np.ndarray:
    """A picture in memory -> u8 [h, w, 3], upright, and on white where it is transparent, as it is from a file."""
    return opaque(ImageOps.exif_transpose(image))


def _upright(frames: Tensor, file: BinaryIO, kind: str) -> Tensor:
    """Square frames u8 [f, 3, s, s] of a picture's file as they were meant: telephones store how they were held."""
    file.seek(0)
    try:
        with Image.open(file, formats=[kind]) as image:
            turn = image.getexif().get(ORIENTATION, 1)
    except (Image.DecompressionBombWarning, OSError, SyntaxError, ValueError, struct.error):
        return frames  # the pixels decode; what is said about them doesn't
    if turn in (5, 6, 7, 8):  # rows and columns are swapped
        frames = frames.transpose(2, 3)
    flips = [dim for dim, turns in ((2, (3, 4, 7, 8)), (3, (2, 3, 6, 7))) if turn in turns]
    return frames.flip(flips).contiguous()


def _decode_damaged(file: BinaryIO, kind: str, size: int, most: int, fps: float, told: Told) -> Seen:
    with av.open(file, format=kind) as container:
        stream = video_stream(container)
        stamps, claimed = _stamps(container, stream), _claimed_seconds(container, stream)
        announced = stream.frames  # by the header; 0 where it says nothing
    if not stamps:
        raise SampleError("video without frames")
    start, length = stamps[0], stamps[-1] - stamps[0]
    lasts = length * len(stamps) / max(len(stamps) - 1, 1)  # with the time of the last frame itself
    wanted = [n / fps for n in spread(int(length * fps) + 1, most)]
    seen, seconds = [], []
    file.seek(0)
    with av.open(file, format=kind) as container:
        stream = video_stream(container)
        for n, picture in _pictures_left(container, stream, [start + at for at in wanted], stamps):
            seen.append(_small(picture, size))
            seconds.append(wanted[n])
            if told:
                told(n + 1, len(wanted))
    if not seen:
        raise SampleError("undecodable video")
    notes = []
    if claimed > lasts + 1 and not 0 < announced <= len(stamps):  # the last frame may stay longer than others
        notes.append(f"the file is cut short: read {lasts:.0f} of {claimed:.0f} seconds")
    if len(seen) < len(wanted):
        notes.append(f"{len(wanted) - len(seen)} of {len(wanted)} frames are damaged and left out")
    return Seen(torch.from_numpy(np.stack(seen)), seconds, "; ".join(notes))


def _stamps(container, stream) -> list[float]:
    """The times of all packets that can be read, rising; decodes nothing."""
    stamps = []
    try:
        for packet in container.demux(stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None and not packet.is_discard:
                stamps.append(float(stamp * packet.time_base))
    except av.FFmpegError:
        pass  # the rest of the file is missing; the caller compares with what its header claims
    return sorted(stamps)


def _claimed_seconds(container, stream) -> float:
    """How long the header says the video is; 0 where it doesn't. The container's own number counts sound as well."""
    shown = None if stream.duration is None else float(stream.duration * stream.time_base)
    if stream.frames and stream.average_rate:
        stored = float(stream.frames / stream.average_rate)
        return stored if shown is None else min(stored, shown)  # a trimmed video stores more than it shows
    if shown is not None:
        return shown
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def _pictures_left(container, stream, wanted: list[float], stamps: list[float]) -> Iterator[tuple[int, av.VideoFrame]]:
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
    """All frames that decode, over damaged packets and up to where the file ends."""
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


def _small(picture: av.VideoFrame, size: int) -> np.ndarray:
    """u8 [3, size, size], upright: telephones store how they were held."""
    refuse_absurd(picture.width, picture.height)
    wide, high = short_side(picture.width, picture.height, size)
    pixels = fit(picture.to_ndarray(format="rgb24", width=wide, height=high, interpolation="BILINEAR"), size)
    return np.rot90(pixels, picture.rotation // 90).transpose(2, 0, 1)


def camera(source: str, size: int, fps: float = 1.0) -> Iterator[Tensor]:
    """What a camera sees, `fps` times a second, as frames u8 [3, size, size]; the newest one, whatever time it takes.

    `source` is the number of a camera (0 is the first), or a file that stands in for one and ends at its end.
    Raises BadSample, with one line, for a camera that is not there.
    """
    format, name = CAMERAS.get(sys.platform, CAMERAS["linux"])
    live = source.isdigit() or source.startswith("/dev/")
    try:
        if live:
            container = av.open(name.format(source) if source.isdigit() else source, format=format)
        else:
            with open(source, "rb") as file:
                kind = kind_of(file)
            if kind is None or kind in (*PICTURES.values(), "GIF"):
                raise SampleError(f"{source} is no video and no camera; cameras are numbered from 0")
            container = av.open(source, format=kind)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, SampleError):
            raise
        why = getattr(error, "strerror", None) or error
        raise SampleError(
            f"no {'camera' if live else 'video'} {source} ({why}); cameras are numbered from 0"
        ) from error
    with container:
        stream, due = video_stream(container), -1.0
        for picture in _decode_left(container, stream):
            now = time.monotonic() if live else picture.time
            if now >= due:
                due = now + 1 / fps - 1e-6
                yield torch.from_numpy(np.ascontiguousarray(_small(picture, size)))


def _whole(file: BinaryIO, format: str) -> tuple[BinaryIO, bool]:
    """The file and True; a WebP that is cut short comes mended to its last whole picture, which libwebp insists on."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if format == "GIF":
        file.seek(max(end - 1, 0))
        whole = file.read(1) == b";"
        file.seek(0)
        return file, whole
    head = file.read(12)
    if int.from_bytes(head[4:8], "little") + 8 <= end:
        file.seek(0)
        return file, True
    data = bytearray(head + file.read())
    at = 12
    while (after := at + 8 + (length := int.from_bytes(data[at + 4 : at + 8], "little")) + length % 2) <= len(data):
        at = after
    data[4:8] = (at - 8).to_bytes(4, "little")
    return io.BytesIO(bytes(data[:at])), False


def _decode_picture(file: BinaryIO, format: str, size: int, most: int, fps: float) -> Seen:
    extension = next(e for e, name in PICTURES.items() if name == format)
    return Seen(decode_pictures([(extension, file.read())], size), [0.0], "", still=True)


def _decode_animation(file: BinaryIO, format: str, size: int, most: int, fps: float) -> Seen:
    frames: list[np.ndarray] = []
    read, begins, ends, moves = 0, 0.0, 0.0, False
    file, whole = _whole(file, format)

    def show(until: float) -> None:
        while len(frames) / fps < until - 1e-6:
            frames.append(fit(pixels, size).transpose(2, 0, 1))

    try:
        with Image.open(file, formats=[format]) as image:
            refuse_absurd(*image.size)
            moves = getattr(image, "is_animated", False)
            with suppress(EOFError):  # how Pillow tells the end
                while not read or most > 1:
                    image.seek(read)
                    following = opaque(image)
                    if read:
                        show(until=ends)
                    pixels, begins, read = following, ends, read + 1
                    milliseconds = image.info.get("duration", 0)
                    ends += (milliseconds if milliseconds > 10 else 100) / 1000  # what browsers do without a time
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("absurd picture size") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, IndexError, struct.error) as error:
        if isinstance(error, SampleError):
            raise
        whole = False
    if not read:
        raise SampleError("undecodable picture")
    show(until=begins + 2e-6)  # as of videos: the last one counts at its beginning
    kept = spread(len(frames), most)
    note = "" if whole else f"the file is cut short or damaged: read {read} pictures, {ends:.1f} seconds"
    return Seen(torch.from_numpy(np.stack([frames[n] for n in kept])), [n / fps for n in kept], note, still=not moves)
