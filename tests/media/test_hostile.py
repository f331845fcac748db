"""Files made to take all memory or time: refused by cause, or read within a worker's means."""

import io
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fovlm.data.workers import bounded_memory
from fovlm.errors import SampleError
from fovlm.media import clip, decode
from fovlm.media.tolerant import decode_some
from helpers import tiny

WORKER_MB = 512


def saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


PICTURES = {
    "thin.png": lambda: saved(Image.new("L", (1, 2000)), "PNG"),
    "wide.png": lambda: saved(Image.new("L", (65_535, 1)), "PNG"),
    "long.jpg": lambda: saved(Image.new("RGB", (223, 65_000)), "JPEG"),
    "large.png": lambda: saved(Image.new("RGBA", (7000, 7000)), "PNG", compress_level=1),
    "large.webp": lambda: saved(Image.new("RGBA", (3500, 3500)), "WEBP", lossless=True, method=0),
    "progressive.jpg": lambda: saved(Image.new("RGB", (5700, 5700)), "JPEG", progressive=True, subsampling=0),
}
READ = r"""
import pathlib, re, sys
import fovlm.data.dataset  # what a worker has imported
from fovlm.media.decode import decode_pictures
for path in map(pathlib.Path, sys.argv[1:]):
    frames = decode_pictures([(path.suffix[1:], path.read_bytes())], 224)
    peak = re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]
    print(path.name, tuple(frames.shape), int(peak) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_pictures_take_bounded_memory(tmp_path):
    for name, make in PICTURES.items():
        (tmp_path / name).write_bytes(make())
    files = [str(tmp_path / name) for name in PICTURES]
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True, check=True)
    for line, name in zip(done.stdout.splitlines(), PICTURES, strict=True):
        assert line.startswith(f"{name} (1, 3, 224, 224)")
        assert int(line.split()[-1]) < WORKER_MB, line


def test_large_pictures_are_reduced_first_and_look_the_same(monkeypatch):
    monkeypatch.setattr(decode, "LARGE", 10_000)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    whole = Image.fromarray(pixels).resize((396, 270), Image.Resampling.BICUBIC)
    frame = decode.decode_pictures([("png", saved(whole, "PNG"))], 32)[0]
    expected = decode.fit(np.asarray(whole), 32).transpose(2, 0, 1)
    assert np.abs(frame.numpy().astype(int) - expected).mean() < 2


@pytest.mark.parametrize("size", [(1, 50_000_000), (50_000_000, 1)])
def test_no_picture_has_such_a_side(size):
    with pytest.raises(SampleError, match="absurd picture size"):
        decode.decode_pictures([("png", tiny.png_header(*size))], 16)


def test_the_scans_of_a_jpeg_are_limited(monkeypatch):
    data = saved(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : -2]
    data = data[:-2] + last * 2000 + data[-2:]
    assert len(data) < 235_000
    start = time.process_time()
    with pytest.raises(SampleError, match="absurd number of scans"):
        decode.decode_pictures([("jpg", data)], 16)
    assert time.process_time() - start < 1
    camera = saved(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    assert len(decode.decode_pictures([("jpg", camera)], 16)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's own memory")
@pytest.mark.skipif("libx264" not in av.codecs_available, reason="needs an encoder that keeps 16 frames")
def test_a_video_that_keeps_many_frames_in_memory_is_refused():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 1600, 1200, "yuv420p"
        stream.options = {"preset": "ultrafast", "x264-params": "ref=16:bframes=0"}
        for _ in range(18):
            container.mux(stream.encode(av.VideoFrame(1600, 1200, "yuv420p")))
        container.mux(stream.encode())
    with pytest.raises(SampleError, match=r"undecodable video|too much memory"), bounded_memory(12 << 20):
        decode.decode_video(out.getvalue(), "mp4", 16, 18, 64)
    with bounded_memory():
        assert len(decode.decode_video(out.getvalue(), "mp4", 16, 18, 64)) == 18


def test_a_video_that_claims_more_samples_than_bytes():
    video = tiny.video(2)
    at = video.index(b"stsz")
    video = video[: at + 8] + (1).to_bytes(4, "big") + (60_000_000).to_bytes(4, "big") + video[at + 16 :]
    for work in (lambda: decode.video_seconds(video, "mp4"), lambda: decode_some(io.BytesIO(video), "mp4", 16, 2)):
        with pytest.raises(SampleError, match="absurd number of frames"):
            work()


def test_a_time_stamp_beyond_all_videos(tmp_path):
    out = io.BytesIO()
    with av.open(io.BytesIO(tiny.video(2))) as source, av.open(out, "w", format="matroska") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        packets[-1].pts = packets[-1].dts = int((2**31 + 9) / Fraction(packets[-1].time_base))
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    with pytest.raises(SampleError, match="absurd video length"):
        decode.video_seconds(out.getvalue(), "mkv")


@pytest.mark.parametrize(("format", "longest"), [("WEBP", 16_000_000), ("GIF", 600_000)])
def test_an_animation_whose_pictures_stay_for_hours(tmp_path, format, longest):
    pictures = [Image.new("RGB", (16, 16), (50 * n,) * 3) for n in range(5)]
    path = Path(tmp_path / "a.webp")
    pictures[0].save(path, format, save_all=True, append_images=pictures[1:], duration=longest, lossless=True)
    found = clip.read_clip(path, 16, max_frames=9)
    assert found.seconds[-1] == 4 * longest / 1000
    assert found.frames.float().mean(dim=(1, 2, 3)).round().tolist() == [0, 0, 50, 50, 100, 100, 150, 150, 200]
