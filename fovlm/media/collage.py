"""Pictures with transparency, placed on frames."""

from pathlib import Path

import numpy as np
from PIL import Image

from fovlm.media.decode import PICTURE_ERRORS, decoder_errors, refuse_absurd


def load_cutout(file: Path, side: int) -> np.ndarray | None:
    """A PNG without its transparent margin, its longer side at most `side` -> u8 [h, w, 4]; None if it is opaque.
    Raises SampleError."""
    with decoder_errors("undecodable picture", PICTURE_ERRORS), Image.open(file, formats=["PNG"]) as image:
        refuse_absurd(*image.size)
        if not image.has_transparency_data:
            return None
        clear = image.convert("RGBA")
    clear = clear.crop(clear.getchannel("A").getbbox())
    clear.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(clear)


def place(frame: np.ndarray, cutout: np.ndarray, center: tuple[float, float], side: int, angle: float) -> list[int]:
    """Draw a cutout u8 [h, w, 4] into a frame u8 [height, width, 3], turned by `angle` degrees, its longer side `side`
    pixels -> its box [left, top, right, bottom] in the frame."""
    image = Image.fromarray(cutout).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getchannel("A").getbbox())
    scale = side / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    canvas = Image.fromarray(frame)
    left, top = round(center[0] - image.width / 2), round(center[1] - image.height / 2)
    canvas.paste(image, (left, top), image)
    frame[:] = np.asarray(canvas)
    height, width = frame.shape[:2]
    return [max(left, 0), max(top, 0), min(left + image.width, width), min(top + image.height, height)]
