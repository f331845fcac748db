"""Samples of up to 10 MB that are made to fill the memory, and how much reading them takes.

`python -m helpers.memory FOLDER` reads each in a process of its own, as a run does: indexed, tokenized, decoded under a
worker's limit. It prints a line for each: its name, how many MB it took at most, what came of it.
"""

import io
import json
import os
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch.utils.data
from PIL import Image

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.shards import write_shard
from helpers import tiny

SIDE = 7000  # 49 million pixels
TEXT = 8_000_000  # characters
SAMPLES = 60_000_000  # that a table of a video claims


def write_all(folder: Path) -> list[str]:
    """Write a shard for each, of it and an ordinary sample -> their names."""
    names = []
    ordinary = {"__key__": "z", "json": tiny.conversation()}
    for name, sample in _samples():
        write_shard(folder / f"{name}.tar", [{"__key__": "a", "json": tiny.conversation(), **sample}, ordinary])
        names.append(name)
    good = (folder / "jpg-noise.tar").read_bytes()
    whole = good.rstrip(b"\0")  # without its end mark
    (folder / "pax-headers.tar").write_bytes(whole + bytes(-len(whole) % 512) + _pax_headers() + good)
    return [*names, "pax-headers"]


def _samples() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, members) of each."""
    for mode in ("RGB", "RGBA", "I;16", "1", "P"):
        yield f"png-{mode.replace(';', '')}", {"png": _picture(mode, SIDE, "PNG")}
    yield "jpg", {"jpg": _picture("RGB", SIDE, "JPEG")}
    yield "jpg-cmyk", {"jpg": _picture("CMYK", SIDE, "JPEG")}
    yield "jpg-progressive", {"jpg": _picture("RGB", SIDE, "JPEG", progressive=True)}
    yield "jpg-cmyk-progressive", {"jpg": _picture("CMYK", 4900, "JPEG", progressive=True)}
    for side in (3500, SIDE):
        yield f"webp-{side}", {"webp": _picture("RGB", side, "WEBP", lossless=True, quality=0, method=0)}
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), np.uint8)
    yield "jpg-noise", {"jpg": _saved(Image.fromarray(noise), "JPEG", quality=90)}
    frame = _picture("RGB", 16, "JPEG")
    yield "many-frames", {f"{n:05d}.jpg": frame for n in range(7000)}
    whole = tiny.video(2)
    at = whole.index(b"stsz")
    yield "mp4-stsz", {"mp4": whole[: at + 8] + struct.pack(">II", 1, SAMPLES) + whole[at + 16 :]}
    yield "mp4-trun", {"mp4": _fragmented()}
    if "libx264" in av.codecs_available:
        yield "mp4-16-frames", {"mp4": _sixteen_frames()}
    yield "mkv-packets", {"mkv": _packets(200_000)}
    texts = {"words": "red " * (TEXT // 4), "no-blanks": "red." * (TEXT // 4), "emoji": "\U0001f600 " * (TEXT // 5)}
    for name, answer in texts.items():
        yield f"text-{name}", {"json": tiny.conversation(answer)}
    dicts = json.dumps([{"": 0}] * (TEXT // 9)).encode()
    for name, junk in {"dicts": dicts, "lists": b"[" + b"[]," * (TEXT // 3) + b"[]]"}.items():
        yield f"json-{name}", {"json": json.dumps(tiny.conversation()).encode()[:-1] + b', "junk": ' + junk + b"}"}


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _picture(mode: str, side: int, format: str, **options: Any) -> bytes:
    return _saved(Image.new(mode, (side, side)), format, **options)


def _fragmented() -> bytes:
    """A video whose last fragment claims many samples of one size."""
    out, flags = io.BytesIO(), {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(io.BytesIO(tiny.video(2))) as source, av.open(out, "w", format="mp4", options=flags) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    video = bytearray(out.getvalue())
    struct.pack_into(">II", video, video.rindex(b"trun") + 4, 0, SAMPLES)
    return bytes(video)


def _sixteen_frames() -> bytes:
    """A video whose decoder keeps 16 frames of 12 million pixels."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 4000, 3000, "yuv420p"
        stream.options = {"preset": "ultrafast", "x264-params": "ref=16:bframes=0"}
        frame = av.VideoFrame(4000, 3000, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for frame.pts in range(18):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def _packets(count: int) -> bytes:
    """A video of so many packets, each the same small frame."""
    out = io.BytesIO()
    with av.open(io.BytesIO(tiny.video(1))) as source, av.open(out, "w", format="matroska") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        first = bytes(next(source.demux(video=0)))
        for n in range(count):
            packet = av.Packet(first[:30])
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, stream.time_base, n, n
            container.mux(packet)
    return out.getvalue()


def _pax_headers() -> bytes:
    """10 MB of headers for the next file, of short records with other keys."""
    out, number = io.BytesIO(), 0
    while out.tell() < 10_000_000:
        records = b""
        while len(records) < 65_000:
            record = f" {number % 16**5:x}=\n".encode()
            records += str(len(record) + 1).encode() + record
            number += 1
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(records)
        out.write(info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512))
    return out.getvalue()


def _read(shard: Path) -> str:
    """What came of both samples of a shard."""
    source = DataSource(shards=str(shard), kind="mixed")
    chat = ChatTokenizer(tiny.tokenizer(), "after_frames", "answer", 2048)
    data = Dataset({"all": source}, {"all": 1.0}, chat, frame_size=224, max_frames=64)
    torch.utils.data.get_worker_info = lambda: True
    found = (data.read(position) for position in range(2))
    return ", ".join(issue.cause if issue else "read" for _, issue in found)


def _forked(work: Callable[[], str]) -> tuple[int, str]:
    """(the peak of a process in MB, what `work` says in it)."""
    out, into = os.pipe()
    if not (pid := os.fork()):
        os.write(into, work().encode())
        os._exit(0)
    os.close(into)
    _, status, usage = os.wait4(pid, 0)
    return usage.ru_maxrss >> 10, os.fdopen(out).read() or f"status {status}"


def main() -> None:
    idle, _ = _forked(lambda: "")
    for shard in sorted(Path(sys.argv[1]).glob("*.tar")):
        peak, said = _forked(partial(_read, shard))
        print(shard.stem, peak - idle, said, flush=True)


if __name__ == "__main__":
    main()
