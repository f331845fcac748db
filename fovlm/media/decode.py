"""Strict decoding for training: pictures and videos as bytes -> frames u8 [f, 3, size, size].

The input is untrusted. The container comes from the file's extension and is never guessed (FFmpeg would guess playlists
that open other files), absurd sizes in a header are refused before a pixel is decoded, and any decoder error becomes a
`SampleError` with a countable cause. `tolerant.py` decodes damaged files as far as possible.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from fovlm.errors import SampleError

PICTURES = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}  # extension -> Pillow's name of the format
VIDEOS = {"mp4": "mp4", "webm": "matroska", "mkv": "matroska"}  # extension -> FFmpeg's name of the container
MAX_PIXELS = 50_000_000  # larger pictures are refused; an 8K frame has 33 million pixels
MAX_SIDE = 65_535  # what a JPEG can have
MAX_BYTES = 200_000_000  # that a decoder may take for one picture, beside the picture itself
MAX_SCANNED = 1_000_000_000  # pixels of a JPEG times its scans; each scan of a progressive one passes over all pixels
MAX_SECONDS = 86_400  # longer videos are refused: a time stamp is damaged
MAX_ASPECT = 8  # of a picture; what is further from the middle is cut off before it is resized
LARGE = 8_000_000  # pixels; larger pictures without a scale of their own are first reduced by a whole factor
BAND = 1 << 20  # pixels that are converted at once
SEEK_AFTER = 8.0  # seconds between two frames above which seeking is faster than decoding the frames in between
JPEG_BYTES = {"444": 6, "422": 4, "440": 4, "420": 3, "411": 3, "Gray": 2}  # coefficients of a pixel, for all scans
VIDEO_ERRORS = (av.FFmpegError, ValueError, ArithmeticError, MemoryError)
# Pillow's plugins raise SyntaxError for broken PNG chunks and OSError for truncated data.
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, MemoryError)


def spread(count: int, most: int) -> list[int]:
    """The numbers 0 .. count - 1, or `most` of them evenly spaced, first and last included, when there are more."""
    if count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


@contextmanager
def decoder_errors(cause: str, errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Within the block, these errors of a decoder become SampleError(cause)."""
    try:
        yield
    except SampleError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("absurd picture size") from error
    except errors as error:
        raise SampleError("decoding takes too much memory" if isinstance(error, MemoryError) else cause) from error


def decode_media(media: list[tuple[str, bytes]], count: int, size: int, most: int) -> Tensor:
    """`count` pictures, or one video of `count` seconds, with their extensions -> u8 [f, 3, size, size], f <= most.
    Raises SampleError."""
    if media and media[0][0] in VIDEOS:
        ((extension, data),) = media
        return decode_video(data, extension, size, count, most)
    return decode_pictures([media[n] for n in spread(count, most)], size)


def decode_pictures(pictures: list[tuple[str, bytes]], size: int) -> Tensor:
    """f pictures, each with its extension -> u8 [f, 3, size, size]: short side resized to `size`, then center crop.

    JPEGs are decoded at the smallest of libjpeg's scales that is still large enough; a picture of the right size is
    not resampled. Transparent pixels become white. Raises SampleError.
    """
    frames = np.empty((len(pictures), size, size, 3), dtype=np.uint8)
    for frame, (extension, data) in zip(frames, pictures, strict=True):
        with decoder_errors("undecodable picture", PICTURE_ERRORS):
            pixels = _decode_jpeg(data, frame) if PICTURES[extension] == "JPEG" else None
            if pixels is None:
                with Image.open(io.BytesIO(data), formats=[PICTURES[extension]]) as image:
                    refuse_absurd(*image.size, 16 if extension == "webp" else 4)  # bytes a pixel that they take
                    pixels = read_pixels(image, size)
        if pixels is not frame:
            frame[:] = fit(pixels, size)
    return channels_first(frames)


def channels_first(frames: np.ndarray) -> Tensor:
    """u8 [f, h, w, 3] -> [f, 3, h, w] without moving a byte: decoders write pixel by pixel, and a copy takes time."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _decode_jpeg(data: bytes, frame: np.ndarray) -> np.ndarray | None:
    """u8 [h, w, 3], which is `frame` where that has its size; or None for CMYK, which only Pillow reads."""
    height, width, colours, sampling = simplejpeg.decode_jpeg_header(data)
    refuse_absurd(width, height)
    # A scan takes some bytes, so small files need no search. Compressed data never hold these two markers.
    if width * height * len(data) > 8 * MAX_SCANNED and any(sof in data for sof in (b"\xff\xc2", b"\xff\xca")):
        refuse_absurd(width, height, JPEG_BYTES.get(sampling, 8))
        if width * height * data.count(b"\xff\xda") > MAX_SCANNED:
            raise SampleError("absurd number of scans")
    if colours in ("CMYK", "YCCK"):
        return None
    if (height, width, 3) == frame.shape:
        simplejpeg.decode_jpeg(data, "RGB", buffer=frame)
        return frame
    return simplejpeg.decode_jpeg(data, "RGB", min_height=len(frame), min_width=len(frame))


def opaque(image: Image.Image) -> np.ndarray:
    """u8 [h, w, 3], on white where the picture is transparent."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    clear = image.convert("RGBA")
    white = Image.new("RGBA", clear.size, "white")
    return np.asarray(Image.alpha_composite(white, clear).convert("RGB"))


def read_pixels(image: Image.Image, size: int) -> np.ndarray:
    """An open picture -> u8 [h, w, 3], opaque, no longer than `fit` looks at, and of moderate size.

    Done in bands: beside the decoded picture it takes no memory to speak of.
    """
    width, height = _longest(*image.size)
    factor = max(1, min(width, height) // (2 * size)) if width * height > LARGE else 1
    width, height = width - width % factor, height - height % factor
    left, top = (image.width - width) // 2, (image.height - height) // 2
    rows = -(-BAND // (width * factor)) * factor
    bands = []
    for y in range(top, top + height, rows):
        band = opaque(image.crop((left, y, left + width, min(y + rows, top + height))))
        bands.append(band if factor == 1 else np.asarray(Image.fromarray(band).reduce(factor)))
    return np.concatenate(bands)


def refuse_absurd(width: int, height: int, bytes_of_pixel: int = 0) -> None:
    """Raises SampleError for a size that no real picture has, or whose decoder takes more than MAX_BYTES."""
    most = min(MAX_PIXELS, MAX_BYTES // max(bytes_of_pixel, 1))
    if width < 1 or height < 1 or max(width, height) > MAX_SIDE or width * height > most:
        raise SampleError("absurd picture size")


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """u8 [h, w, 3] -> [size, size, 3]: short side resized to `size`, then center crop."""
    height, width = pixels.shape[:2]
    if min(height, width) != size:
        pixels = _middle(pixels, *_longest(width, height))
        width, height = scaled(pixels.shape[1], pixels.shape[0], size)
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return _middle(pixels, size, size)


def _longest(width: int, height: int) -> tuple[int, int]:
    """The size of the middle part that is no longer than MAX_ASPECT times the short side."""
    most = MAX_ASPECT * min(width, height)
    return min(width, most), min(height, most)


def _middle(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def fit_frame(frame: av.VideoFrame, size: int) -> np.ndarray:
    """A decoded video frame -> u8 [size, size, 3], resized and cropped like a picture. Raises SampleError."""
    refuse_absurd(frame.width, frame.height)
    width, height = scaled(frame.width, frame.height, size)
    if max(width, height) > MAX_ASPECT * size:
        return fit(frame.to_ndarray(format="rgb24"), size)
    return fit(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR"), size)


def scaled(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) scaled so that the shorter one is `size`."""
    scale = size / min(width, height)
    return max(size, round(width * scale)), max(size, round(height * scale))


def video_seconds(data: bytes, extension: str) -> int:
    """How many frames a video gives at one a second: those on screen at 0 s, 1 s, ... up to its last frame.

    Reads packets and decodes nothing. Raises SampleError.
    """
    refuse_absurd_tables(io.BytesIO(data))
    with (
        decoder_errors("undecodable video", VIDEO_ERRORS),
        av.open(io.BytesIO(data), format=VIDEOS[extension]) as container,
    ):
        packets = container.demux(video_stream(container))
        stamps = [float(p.pts * p.time_base) for p in packets if p.pts is not None and not p.is_discard]
    if not stamps:
        raise SampleError("video without frames")
    if (seconds := max(stamps) - min(stamps)) > MAX_SECONDS:
        raise SampleError("absurd video length")
    return int(seconds) + 1


def refuse_absurd_tables(file: BinaryIO) -> None:
    """Raises SampleError for an MP4 that lists more samples in a table than it has bytes, and leaves it at its start.

    Samples of one size take no room in a table, and FFmpeg's own list of them up to 72 bytes each.
    """
    size, seen = file.seek(0, io.SEEK_END), b""
    file.seek(0)
    while block := file.read(1 << 24):
        seen = seen[-20:] + block
        for name, to_count in ((b"stsz", 12), (b"trun", 8)):  # ISO/IEC 14496-12, 8.7.3 and 8.8.8
            at = seen.find(name, 4)
            while 0 <= at <= len(seen) - 16:
                box, count = (int.from_bytes(seen[i : i + 4], "big") for i in (at - 4, at + to_count))
                if 16 <= box <= size < count:
                    raise SampleError("absurd number of frames")
                at = seen.find(name, at + 1)
    file.seek(0)


def decode_video(data: bytes, extension: str, size: int, seconds: int, most: int) -> Tensor:
    """A video of `seconds` (counted by `video_seconds`) -> u8 [f, 3, size, size], f = min(seconds, most).

    One frame a second, or `most` evenly spaced seconds of a longer video; each is the frame on screen at that second.
    Decodes in one thread, since the data loader's workers already run in parallel. Raises SampleError.
    """
    wanted = spread(seconds, most)
    frames = np.empty((len(wanted), size, size, 3), dtype=np.uint8)
    found = 0
    with (
        decoder_errors("undecodable video", VIDEO_ERRORS),
        av.open(io.BytesIO(data), format=VIDEOS[extension]) as container,
    ):
        for found, frame in enumerate(_frames_at(container, video_stream(container), wanted), start=1):
            frames[found - 1] = fit_frame(frame, size)
    if found != len(wanted):
        raise SampleError("video shorter than its index says")
    return channels_first(frames)


def video_stream(container) -> av.VideoStream:
    """The first video stream of an open container, ready to decode in one thread. Raises SampleError."""
    if not container.streams.video:
        raise SampleError("video without frames")
    stream = container.streams.video[0]
    if stream.codec_context is None:  # FFmpeg has no decoder for it, or its description is damaged
        raise SampleError("undecodable video")
    refuse_absurd(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # sizes may change in the middle of a stream
    stream.codec_context.thread_count = 1
    return stream


def _frames_at(container, stream, seconds: list[int]) -> Iterator[av.VideoFrame]:
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
