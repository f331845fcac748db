"""Pictures and videos as bytes -> frames u8 [f, 3, size, size]. The one door to simplejpeg, Pillow and PyAV.

Everything here reads bytes that strangers made. So the container is named by the file's extension or its first bytes
and never guessed by FFmpeg (which would guess playlists that open other files), sizes are read from the headers and
refused when absurd before a pixel is decoded, and whatever a decoder complains about becomes a `BadSample` with a
countable cause.
"""

import io
from bisect import bisect_right
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fovlm.bad import BadSample

PICTURES = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}  # extension -> Pillow's name of the format
VIDEOS = {"mp4": "mp4", "webm": "matroska", "mkv": "matroska"}  # extension -> FFmpeg's name of the container
MAX_PIXELS = 50_000_000  # a picture that claims more is refused; 8K video has 33 million
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
SEEK_AFTER = 8.0  # seconds between two wanted frames from which seeking beats decoding all that lies between


def spread(count: int, most: int) -> list[int]:
    """The numbers 0 .. count - 1, or `most` of them evenly spaced, first and last included, when there are more."""
    if count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


def decode_pictures(pictures: list[tuple[str, bytes]], size: int) -> Tensor:
    """f pictures, each with its extension -> u8 [f, 3, size, size]: short side resized to `size`, then the middle.

    JPEGs are decoded at the smallest of libjpeg's scales that is still large enough; a picture of the right size is
    not resampled. Transparent pictures lie on white. Raises BadSample.
    """
    frames = np.empty((len(pictures), 3, size, size), dtype=np.uint8)
    for frame, (extension, data) in zip(frames, pictures, strict=True):
        pixels = _decode_jpeg(data, size) if PICTURES[extension] == "JPEG" else None
        if pixels is None:
            pixels = _decode_pillow(data, PICTURES[extension])
        frame[:] = _fit(pixels, size).transpose(2, 0, 1)
    return torch.from_numpy(frames)


def _decode_jpeg(data: bytes, size: int) -> np.ndarray | None:
    """u8 [h, w, 3], or None for the few JPEGs (CMYK) that Pillow has to read."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_absurd(width, height)
        if colours in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size)
    except ValueError as error:
        raise error if isinstance(error, BadSample) else BadSample("undecodable picture") from error


def _decode_pillow(data: bytes, format: str) -> np.ndarray:
    """u8 [h, w, 3]."""
    try:
        with Image.open(io.BytesIO(data), formats=[format]) as image:
            _refuse_absurd(*image.size)
            return _opaque(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("absurd picture size") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow's plugins raise SyntaxError for broken PNG chunks and OSError for truncated data.
        raise error if isinstance(error, BadSample) else BadSample("undecodable picture") from error


def _opaque(image: Image.Image) -> np.ndarray:
    """u8 [h, w, 3], on white where the picture is transparent."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    clear = image.convert("RGBA")
    white = Image.new("RGBA", clear.size, "white")
    return np.asarray(Image.alpha_composite(white, clear).convert("RGB"))


def _refuse_absurd(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise BadSample("absurd picture size")


def _fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """u8 [h, w, 3] -> [size, size, 3]: short side to `size`, then the middle."""
    height, width = pixels.shape[:2]
    if min(height, width) != size:
        wide, high = _short_side(width, height, size)
        pixels = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def _short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) scaled so that the shorter one is `size`."""
    scale = size / min(width, height)
    return max(size, round(width * scale)), max(size, round(height * scale))


def video_seconds(data: bytes, extension: str) -> int:
    """How many frames a video gives at one a second: those on screen at 0 s, 1 s, ... up to its last frame.

    Reads packets and decodes nothing. Raises BadSample.
    """
    try:
        with av.open(io.BytesIO(data), format=VIDEOS[extension]) as container:
            stream = _video_stream(container)
            shown = (p for p in container.demux(stream) if p.pts is not None and not p.is_discard)
            stamps = [float(p.pts * p.time_base) for p in shown]
    except (av.FFmpegError, ValueError) as error:
        raise error if isinstance(error, BadSample) else BadSample("undecodable video") from error
    if not stamps:
        raise BadSample("video without frames")
    return int(max(stamps) - min(stamps)) + 1


def decode_video(data: bytes, extension: str, size: int, seconds: int, most: int) -> Tensor:
    """A video of `seconds` (as `video_seconds` counted them) -> u8 [f, 3, size, size], f = min(seconds, most).

    One frame a second, or `most` evenly spaced seconds of a longer video. Each is the frame on screen at that second.
    Decodes in one thread: the loader's workers are the parallelism. Raises BadSample.
    """
    wanted = spread(seconds, most)
    frames = np.empty((len(wanted), 3, size, size), dtype=np.uint8)
    try:
        with av.open(io.BytesIO(data), format=VIDEOS[extension]) as container:
            stream = _video_stream(container)
            found = 0
            for found, picture in enumerate(_pictures_at(container, stream, wanted), start=1):
                _refuse_absurd(picture.width, picture.height)
                wide, high = _short_side(picture.width, picture.height, size)
                pixels = picture.to_ndarray(format="rgb24", width=wide, height=high, interpolation="BILINEAR")
                frames[found - 1] = _fit(pixels, size).transpose(2, 0, 1)
    except (av.FFmpegError, ValueError) as error:
        raise error if isinstance(error, BadSample) else BadSample("undecodable video") from error
    if found != len(wanted):
        raise BadSample("video shorter than its index says")
    return torch.from_numpy(frames)


def _video_stream(container) -> av.VideoStream:
    if not container.streams.video:
        raise BadSample("video without frames")
    stream = container.streams.video[0]
    _refuse_absurd(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # sizes may change in the middle of a stream
    stream.codec_context.thread_count = 1
    return stream


def _pictures_at(container, stream, seconds: list[int]) -> Iterator[av.VideoFrame]:
    """The frame on screen at each of the (rising) seconds; stops early when the video does."""
    decoder = _decode(container, stream)
    first = shown = next(decoder, None)
    if first is None:
        return
    following = next(decoder, None)
    for n, second in enumerate(seconds):
        time = first.time + second + 1e-6
        if n and second - seconds[n - 1] > SEEK_AFTER:
            container.seek(int(time / stream.time_base), stream=stream)  # to the key frame before
            decoder = _decode(container, stream)
            shown, following = next(decoder, None), next(decoder, None)
        while following is not None and following.time <= time:
            shown, following = following, next(decoder, None)
        if shown is None or (following is None and shown.time < time - 1):
            return
        if shown.is_corrupt:
            raise BadSample("undecodable video")
        yield shown


def _decode(container, stream) -> Iterator[av.VideoFrame]:
    return (frame for frame in container.decode(stream) if frame.pts is not None)


class Seen(NamedTuple):
    """What could be read of a file."""

    frames: Tensor  # u8 [f, 3, size, size], f >= 1
    seconds: list[float]  # when each frame is on screen, from the start of the video
    note: str  # what could not be read, or nothing


def kind_of(file: BinaryIO) -> str | None:
    """Pillow's or FFmpeg's name of a file's format by its first bytes, or None; leaves the file at its start."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    return next((kind for offset, magic, kind in MAGIC if head[offset:].startswith(magic)), None)


def decode_some(file: BinaryIO, kind: str, size: int, most: int, fps: float = 1.0) -> Seen:
    """A person's video, animation or picture of the kind that `kind_of` tells -> the frames that decode.

    `fps` frames a second, or `most` evenly spaced ones of a longer video; each is the one on screen at that time. What
    is damaged or cut off is left out and told in the note. Raises BadSample when there is nothing to see.
    """
    if kind in ("JPEG", "PNG"):
        extension = next(e for e, format in PICTURES.items() if format == kind)
        return Seen(decode_pictures([(extension, file.read())], size), [0.0], "")
    if kind in ("WEBP", "GIF"):
        return _decode_animation(file, kind, size, most, fps)
    try:
        return _decode_damaged(file, kind, size, most, fps)
    except (av.FFmpegError, ValueError) as error:
        raise error if isinstance(error, BadSample) else BadSample("undecodable video") from error


def _decode_damaged(file: BinaryIO, kind: str, size: int, most: int, fps: float) -> Seen:
    with av.open(file, format=kind) as container:
        stream = _video_stream(container)
        stamps, claimed = _stamps(container, stream), _claimed_seconds(container, stream)
    if not stamps:
        raise BadSample("video without frames")
    start, length = stamps[0], stamps[-1] - stamps[0]
    lasts = length * len(stamps) / max(len(stamps) - 1, 1)  # with the time of the last frame itself
    wanted = [n / fps for n in spread(int(length * fps) + 1, most)]
    seen, seconds = [], []
    file.seek(0)
    with av.open(file, format=kind) as container:
        stream = _video_stream(container)
        for n, picture in _pictures_left(container, stream, [start + time for time in wanted], stamps):
            seen.append(_small(picture, size))
            seconds.append(wanted[n])
    if not seen:
        raise BadSample("undecodable video")
    notes = []
    if claimed > lasts + 1:
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
    if stream.frames and stream.average_rate:
        return float(stream.frames / stream.average_rate)
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def _pictures_left(container, stream, wanted: list[float], stamps: list[float]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number of the wanted time, frame on screen) for each whose frame decodes."""
    decoder = _decode_left(container, stream)
    shown, following = None, next(decoder, None)
    for n, time in enumerate(wanted):
        if n and time - wanted[n - 1] > SEEK_AFTER:
            container.seek(int(time / stream.time_base), stream=stream)  # to the key frame before
            decoder = _decode_left(container, stream)
            shown, following = None, next(decoder, None)
        while following is not None and following.time <= time + 1e-6:
            shown, following = following, next(decoder, None)
        due = stamps[bisect_right(stamps, time + 1e-6) - 1]
        if (
            shown is not None and shown.time > due - 0.2
        ):  # else what belongs here is lost; 0.2: some times are those of decoding
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
    _refuse_absurd(picture.width, picture.height)
    wide, high = _short_side(picture.width, picture.height, size)
    pixels = _fit(picture.to_ndarray(format="rgb24", width=wide, height=high, interpolation="BILINEAR"), size)
    return np.rot90(pixels, picture.rotation // 90).transpose(2, 0, 1)


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


def _decode_animation(file: BinaryIO, format: str, size: int, most: int, fps: float) -> Seen:
    frames: list[np.ndarray] = []
    count = read = 0
    file, whole = _whole(file, format)
    try:
        with Image.open(file, formats=[format]) as image:
            _refuse_absurd(*image.size)
            count, ends = getattr(image, "n_frames", 1), 0.0
            for read in range(count):
                image.seek(read)
                pixels, begins = _opaque(image), ends
                milliseconds = image.info.get("duration", 0)
                ends += (milliseconds if milliseconds > 10 else 100) / 1000  # what browsers do without a time
                until = ends if read < count - 1 else begins + 2e-6
                while len(frames) / fps < until - 1e-6:
                    frames.append(_fit(pixels, size).transpose(2, 0, 1))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("absurd picture size") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, BadSample) or not frames:
            raise error if isinstance(error, BadSample) else BadSample("undecodable picture") from error
    kept = spread(len(frames), most)
    if read < count - 1:
        note = f"the file is damaged: read {read} of {count} pictures"
    else:
        note = "" if whole else f"the file is cut short: read {count} pictures, {begins:.1f} seconds"
    return Seen(torch.from_numpy(np.stack([frames[n] for n in kept])), [n / fps for n in kept], note)


def encode_jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """u8 [h, w, 3] -> a JPEG, for those who make shards."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality)
