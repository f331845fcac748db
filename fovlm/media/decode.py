"""Pictures and videos as bytes -> frames u8 [f, 3, size, size]. `footage.py` reads what people bring.

Everything here reads bytes that strangers made. So the container is named by the file's extension and never guessed
(FFmpeg would guess playlists that open other files), sizes are read from the headers and refused when absurd before
a pixel is decoded, and whatever a decoder complains about becomes a `SampleError` with a countable cause.
"""

import io
import textwrap
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from fovlm.errors import SampleError

PICTURES = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}  # extension -> Pillow's name of the format
VIDEOS = {"mp4": "mp4", "webm": "matroska", "mkv": "matroska"}  # extension -> FFmpeg's name of the container
MAX_PIXELS = 50_000_000  # a picture that claims more is refused; 8K video has 33 million
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
        frame[:] = fit(pixels, size).transpose(2, 0, 1)
    return torch.from_numpy(frames)


def _decode_jpeg(data: bytes, size: int) -> np.ndarray | None:
    """u8 [h, w, 3], or None for the few JPEGs (CMYK) that Pillow has to read."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        refuse_absurd(width, height)
        if colours in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size)
    except ValueError as error:
        raise error if isinstance(error, SampleError) else SampleError("undecodable picture") from error


def _decode_pillow(data: bytes, format: str) -> np.ndarray:
    """u8 [h, w, 3]."""
    try:
        with Image.open(io.BytesIO(data), formats=[format]) as image:
            refuse_absurd(*image.size)
            return opaque(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("absurd picture size") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow's plugins raise SyntaxError for broken PNG chunks and OSError for truncated data.
        raise error if isinstance(error, SampleError) else SampleError("undecodable picture") from error


def opaque(image: Image.Image) -> np.ndarray:
    """u8 [h, w, 3], on white where the picture is transparent."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    clear = image.convert("RGBA")
    white = Image.new("RGBA", clear.size, "white")
    return np.asarray(Image.alpha_composite(white, clear).convert("RGB"))


def refuse_absurd(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise SampleError("absurd picture size")


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """u8 [h, w, 3] -> [size, size, 3]: short side to `size`, then the middle."""
    height, width = pixels.shape[:2]
    if min(height, width) != size:
        wide, high = short_side(width, height, size)
        pixels = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) scaled so that the shorter one is `size`."""
    scale = size / min(width, height)
    return max(size, round(width * scale)), max(size, round(height * scale))


def video_seconds(data: bytes, extension: str) -> int:
    """How many frames a video gives at one a second: those on screen at 0 s, 1 s, ... up to its last frame.

    Reads packets and decodes nothing. Raises BadSample.
    """
    try:
        with av.open(io.BytesIO(data), format=VIDEOS[extension]) as container:
            stream = video_stream(container)
            shown = (p for p in container.demux(stream) if p.pts is not None and not p.is_discard)
            stamps = [float(p.pts * p.time_base) for p in shown]
    except (av.FFmpegError, ValueError) as error:
        raise error if isinstance(error, SampleError) else SampleError("undecodable video") from error
    if not stamps:
        raise SampleError("video without frames")
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
            stream = video_stream(container)
            found = 0
            for found, picture in enumerate(_pictures_at(container, stream, wanted), start=1):
                refuse_absurd(picture.width, picture.height)
                wide, high = short_side(picture.width, picture.height, size)
                pixels = picture.to_ndarray(format="rgb24", width=wide, height=high, interpolation="BILINEAR")
                frames[found - 1] = fit(pixels, size).transpose(2, 0, 1)
    except (av.FFmpegError, ValueError) as error:
        raise error if isinstance(error, SampleError) else SampleError("undecodable video") from error
    if found != len(wanted):
        raise SampleError("video shorter than its index says")
    return torch.from_numpy(frames)


def video_stream(container) -> av.VideoStream:
    if not container.streams.video:
        raise SampleError("video without frames")
    stream = container.streams.video[0]
    if stream.codec_context is None:  # FFmpeg has no decoder for it, or its description is damaged
        raise SampleError("undecodable video")
    refuse_absurd(stream.codec_context.width, stream.codec_context.height)
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
            raise SampleError("undecodable video")
        yield shown


def _decode(container, stream) -> Iterator[av.VideoFrame]:
    return (frame for frame in container.decode(stream) if frame.pts is not None)


def encode_jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """u8 [h, w, 3] -> a JPEG, for those who make shards."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality)


def encode_video(frames: Iterable[np.ndarray], fps: float) -> bytes:
    """Frames u8 [h, w, 3], at least one, of one size with even sides -> an MP4: H.264 where this FFmpeg has it, else
    MPEG-4.
    """
    out = io.BytesIO()
    h264 = "libx264" in av.codecs_available
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264" if h264 else "mpeg4", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if h264:
            stream.options = {"crf": "18"}
        else:
            stream.bit_rate = 4_000_000
        for n, pixels in enumerate(frames):
            if n == 0:
                stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def lettering(lines: list[str], width: int, size: int = 15) -> np.ndarray:
    """Lines of text, light on dark, broken where they are too long -> u8 [h, width, 3], h even."""
    font = ImageFont.load_default(size)
    letters = max(1, int(width / (size * 0.52)))
    broken = [part for line in lines for part in textwrap.wrap(line, letters) or [""]]
    step = round(size * 1.4)
    height = (len(broken) * step + size) // 2 * 2
    image = Image.new("RGB", (width, height), (20, 21, 25))
    pen = ImageDraw.Draw(image)
    for number, part in enumerate(broken):
        pen.text((size // 2, size // 2 + number * step), part, (235, 235, 235), font=font)
    return np.asarray(image)
