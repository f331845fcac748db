"""Small things for tests: a word-level ChatML tokenizer, pictures, videos, shards."""

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.shards import write_shards
from fovlm.data.tokenizers import SPECIAL, chatml_tokenizer
from fovlm.media import encode

TEXT = "You are a helpful AI assistant . ? system user what is this yes no it red blue shown here in the picture"


def tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Every word, mark and white space character is a token; unknown words are `<unk>`."""
    ordinary = list(dict.fromkeys(["\n", " ", *TEXT.split(), *(words or []), *map(str, range(10))]))
    model = models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *ordinary])}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), "isolated")
    return chatml_tokenizer(backend)


def picture(value: int, size: int = 16) -> bytes:
    """A JPEG of one grey level."""
    return encode.encode_jpeg(np.full((size, size, 3), value, np.uint8))


def video(seconds: float, fps: int = 5, size: int = 16, format: str = "mp4") -> bytes:
    """An MPEG-4 video whose grey level is 10 times the second."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = size, size, "yuv420p", Fraction(1, fps)
        for i in range(round(seconds * fps)):
            pixels = np.full((size, size, 3), 10 * (i // fps) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def noise(seconds: int, path, fps: int = 10, size: int = 64, **options) -> None:
    """An MPEG-4 video, key frames every second, noise above, grey at ten times the second below."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = size, size, "yuv420p", fps
        for i in range(seconds * fps):
            pixels = np.full((size, size, 3), 10 * (i // fps), np.uint8)
            pixels[: size // 2] = random.integers(0, 256, (size // 2, size, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def conversation(answer: str = "red", user: str = "what is this ?") -> dict[str, Any]:
    return {"user": user, "assistant": answer, "source": "test"}


def clip(key: str, frames: int, **record: Any) -> dict[str, Any]:
    """A sample of numbered JPEGs, or of text alone when `frames` is 0."""
    pictures = {f"{i:03d}.jpg": picture(10 * i) for i in range(frames)}
    return {"__key__": key, "json": conversation() | record, **pictures}


def clips(folder: Path, name: str, frames: list[int], per_shard: int = 5) -> str:
    """Shards of clips with these numbers of frames; returns their pattern."""
    samples = (clip(f"{name}{i}", f, assistant="it is " + "red " * (i % 3 + 1)) for i, f in enumerate(frames))
    paths = write_shards(folder / f"{name}-%02d.tar", samples, per_shard)
    return str(folder / f"{name}-{{00..{len(paths) - 1:02d}}}.tar")


def dataset(folder: Path) -> Dataset:
    """Three clips."""
    clips(folder, "video", [3, 1, 4])
    source = DataSource(shards="video-00.tar", kind="video")
    return Dataset(
        {"video": source}, {"video": 1.0}, ChatTokenizer(tokenizer(), "before_frames", "answer", 100), frame_size=16
    )


def ready_made(record: dict, tokenizer: PreTrainedTokenizerFast, every_token: bool = False) -> dict:
    """A record's text tokenized ahead of time, with a loss on the answers or on every token."""
    text = ChatTokenizer(tokenizer, "before_frames", "answer", 10**6).text(record, None, True)
    mask = [1 if every_token else int(w) for w in text.weight.tolist()]
    return {"token_ids": text.tokens.tolist(), "loss_mask": mask, "frames_at": text.prompt}
