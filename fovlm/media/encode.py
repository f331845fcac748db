"""Frames to JPEG, PNG, MP4 and lettering."""

import io
import textwrap
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFont


def encode_jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """u8 [h, w, 3] -> a JPEG."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality)


def encode_png(pixels: np.ndarray) -> bytes:
    """u8 [h, w, 3] -> a PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def encode_video(frames: Iterable[np.ndarray], fps: float) -> bytes:
    """Frames u8 [h, w, 3], at least one, of one size with even sides -> an MP4 (H.264, or MPEG-4 if unavailable)."""
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
    """Lines of text, light on dark, wrapped to `width` -> u8 [h, width, 3], h even."""
    font = ImageFont.load_default(size)
    characters = max(1, int(width / (size * 0.52)))
    wrapped = [part for line in lines for part in textwrap.wrap(line, characters) or [""]]
    step = round(size * 1.4)
    height = (len(wrapped) * step + size) // 2 * 2
    image = Image.new("RGB", (width, height), (20, 21, 25))
    pen = ImageDraw.Draw(image)
    for number, part in enumerate(wrapped):
        pen.text((size // 2, size // 2 + number * step), part, (235, 235, 235), font=font)
    return np.asarray(image)
