"""Decoding: exact sizes and counts, nothing absurd, nothing that opens other files."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from fovlm.errors import SampleError
from fovlm.media import decode as media
from fovlm.media.encode import encode_jpeg
from helpers import tiny


def encoded(pixels: np.ndarray, format: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def decode(data: bytes, extension: str, size: int):
    return media.decode_pictures([(extension, data)], size)[0]


def gradient(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


def test_a_picture_of_the_right_size_is_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    frame = decode(encoded(pixels, "PNG"), "png", 32)
    assert np.array_equal(frame.permute(1, 2, 0), pixels)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (20, 30), (300, 100), (33, 32)])
def test_the_short_side_is_resized_and_the_middle_cut_out(extension, shape):
    data = encoded(gradient(*shape), media.PICTURES[extension], quality=95)
    frame = decode(data, extension, 32).float()
    assert frame.shape == (3, 32, 32)
    short = min(shape)
    for channel, side in ((0, shape[1]), (1, shape[0])):
        middle = frame[channel].mean(dim=1 if channel else 0)
        assert abs(middle.mean() - 127) < 6
        assert abs((middle[-1] - middle[0]) - 255 * (short / side) * 31 / 32) < 14


def test_simplejpeg_and_pillow_agree():
    data = encoded(gradient(48, 48), "JPEG", quality=95)
    frame = np.empty((48, 48, 3), np.uint8)
    assert media._decode_jpeg(data, frame) is frame
    difference = frame.astype(int) - media.opaque(Image.open(io.BytesIO(data)))
    assert np.abs(difference).max() <= 3


def test_grey_palette_cmyk_and_transparent_pictures():
    grey = encoded(np.full((16, 16), 7, np.uint8), "JPEG")
    assert decode(grey, "jpg", 16).float().mean() == pytest.approx(7, abs=1)
    out = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(out, "JPEG")
    assert decode(out.getvalue(), "jpg", 16)[0].float().mean() > 200
    clear = encoded(np.zeros((16, 16, 4), np.uint8), "PNG")
    assert decode(clear, "png", 16).min() == 255


def jpeg_header(width: int, height: int) -> bytes:
    data = tiny.picture(1)
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize(
    ("extension", "data"), [("png", tiny.png_header(60_000, 60_000)), ("jpg", jpeg_header(65_000, 65_000))]
)
def test_absurd_sizes_are_refused_by_the_header(extension, data):
    with pytest.raises(SampleError, match="absurd picture size"):
        decode(data, extension, 32)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_broken_pictures(extension):
    good = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), media.PICTURES[extension])
    for data in (b"", b"nonsense", good[: len(good) // 2], good[:20], tiny.video(1)):
        with pytest.raises(SampleError, match="undecodable picture"):
            decode(data, extension, 32)


def test_the_format_is_that_of_the_extension():
    with pytest.raises(SampleError):
        decode(encoded(gradient(16, 16), "GIF"), "png", 16)


@pytest.mark.parametrize(("format", "extension"), [("mp4", "mp4"), ("matroska", "mkv")])
@pytest.mark.parametrize(("seconds", "frames"), [(0.2, 1), (1.0, 1), (1.2, 2), (3.0, 3), (3.8, 4)])
def test_a_video_gives_the_frame_on_screen_at_each_second(format, extension, seconds, frames):
    data = tiny.video(seconds, format=format)
    assert media.video_seconds(data, extension) == frames
    found = media.decode_video(data, extension, 16, frames, 64)
    assert found.shape == (frames, 3, 16, 16)
    assert np.abs(found.float().mean(dim=(1, 2, 3)) - 10 * np.arange(frames)).max() < 3


def test_a_longer_video_is_thinned_evenly_with_and_without_seeking(monkeypatch):
    data = tiny.video(25, fps=2)
    assert media.video_seconds(data, "mp4") == 25
    sought = media.decode_video(data, "mp4", 16, 25, 3)
    monkeypatch.setattr(media, "SEEK_AFTER", 1e9)
    assert np.array_equal(sought, media.decode_video(data, "mp4", 16, 25, 3))
    assert np.abs(sought.float().mean(dim=(1, 2, 3)) - np.array([0, 120, 240])).max() < 3
    assert media.spread(100, 3) == [0, 50, 99]
    assert media.spread(3, 64) == [0, 1, 2]


def test_broken_videos():
    good = tiny.video(4, format="matroska")
    for data in (b"", b"nonsense", good[:100]):
        with pytest.raises(SampleError):
            media.video_seconds(data, "mkv")
    with pytest.raises(SampleError, match="shorter than its index says"):
        media.decode_video(tiny.video(2), "mp4", 16, 4, 64)
    with pytest.raises(SampleError):
        media.decode_video(good[: len(good) // 2], "mkv", 16, 4, 64)


def test_a_playlist_does_not_pass_for_a_video(tmp_path):
    """FFmpeg recognises playlists by their content, and would open what they name."""
    (tmp_path / "secret.mp4").write_bytes(tiny.video(1))
    for playlist in (
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.mp4\n",
        f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n",
    ):
        with pytest.raises(SampleError, match="undecodable video"):
            media.video_seconds(playlist.encode(), "mp4")


def test_an_absurd_video_size_is_refused(monkeypatch):
    data = tiny.video(1)
    monkeypatch.setattr(media, "MAX_PIXELS", 100)
    for read in (lambda: media.video_seconds(data, "mp4"), lambda: media.decode_video(data, "mp4", 16, 1, 64)):
        with pytest.raises(SampleError, match="absurd picture size"):
            read()


def test_jpegs_are_written_and_read():
    pixels = gradient(32, 32)
    back = decode(encode_jpeg(pixels, quality=98), "jpg", 32).permute(1, 2, 0).numpy()
    assert np.abs(back.astype(int) - pixels).mean() < 3
