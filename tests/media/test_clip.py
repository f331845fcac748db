"""Clips that users name: the frames of training, notes about damage, one-line errors."""

import io

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from fovlm.errors import SampleError, UserError
from fovlm.media import decode, tolerant
from fovlm.media.clip import list_clips, read_clip
from helpers import tiny


def saved(path, data: bytes):
    path.write_bytes(data)
    return path


def grey(clip) -> list[int]:
    """The seconds that the lower half of each frame shows."""
    return (clip.frames[:, :, -clip.frames.shape[2] // 4 :].float().mean((1, 2, 3)) / 10).round().int().tolist()


@pytest.mark.parametrize("seconds", [0.4, 2.8, 10, 30])
def test_a_video_gives_the_frames_that_training_would_take(tmp_path, seconds):
    data = tiny.video(seconds)
    there = decode.video_seconds(data, "mp4")
    expected = decode.decode_video(data, "mp4", 16, there, 8)
    clip = read_clip(saved(tmp_path / "a.mp4", data), 16, max_frames=8)
    assert clip.frames.equal(expected)
    assert clip.seconds == decode.spread(there, 8)
    assert clip.note == ""
    assert clip.name == "a.mp4"


@pytest.mark.parametrize("format", ["matroska", "avi", "mov"])
def test_the_first_bytes_tell_the_format_not_the_name(tmp_path, format):
    clip = read_clip(saved(tmp_path / "film.mp4", tiny.video(3, format=format)), 16)
    assert grey(clip) == [0, 1, 2]


def test_more_frames_a_second_on_request(tmp_path):
    clip = read_clip(saved(tmp_path / "a.mp4", tiny.video(2)), 16, fps=4)
    assert clip.seconds == [n / 4 for n in range(8)]
    assert grey(clip) == [0] * 4 + [1] * 4


def test_a_video_that_is_cut_short_gives_its_beginning_and_says_so(tmp_path):
    tiny.noise(12, tmp_path / "a.mp4", movflags="faststart")
    whole = (tmp_path / "a.mp4").read_bytes()
    clip = read_clip(saved(tmp_path / "cut.mp4", whole[: len(whole) * 55 // 100]), 32)
    assert grey(clip) == list(range(len(clip.frames)))
    assert 5 <= len(clip.frames) <= 7
    assert clip.note.startswith("the file is cut short: read ")
    assert clip.note.endswith(" of 12 seconds")


def test_a_video_damaged_in_the_middle_gives_the_rest_and_says_so(tmp_path):
    tiny.noise(12, tmp_path / "a.mp4")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    a, b = len(data) * 40 // 100, len(data) * 55 // 100
    data[a:b] = bytes(b - a)
    clip = read_clip(saved(tmp_path / "bad.mp4", bytes(data)), 32)
    assert clip.note.endswith("of 12 frames are damaged and left out")
    assert grey(clip) == clip.seconds
    assert 8 <= len(clip.frames) <= 11


def animation(format: str, frames: int = 30, milliseconds: int = 100) -> bytes:
    shown = [Image.new("RGB", (20, 30), (10 * (i * milliseconds // 1000),) * 3) for i in range(frames)]
    out = io.BytesIO()
    for i, picture in enumerate(shown):  # equal ones would be merged
        picture.putpixel((0, 0), (i, 255 - i, 0))
    options = {"lossless": True} if format == "WEBP" else {}
    shown[0].save(out, format, save_all=True, append_images=shown[1:], duration=milliseconds, **options)
    return out.getvalue()


@pytest.mark.parametrize("format", ["WEBP", "GIF"])
def test_animations_are_read_like_videos(tmp_path, format):
    path = saved(tmp_path / "a", animation(format))
    clip = read_clip(path, 16)
    assert clip.seconds == [0, 1, 2]
    assert grey(clip) == [0, 1, 2]
    assert len(read_clip(path, 16, fps=10).frames) == 30
    assert read_clip(path, 16, max_frames=2).seconds == [0, 2]
    assert read_clip(path, 16, max_frames=1).seconds == [0]
    assert not read_clip(path, 16, max_frames=1).still
    assert len(read_clip(saved(tmp_path / "b", animation(format, frames=5)), 16).frames) == 1
    cut = read_clip(saved(tmp_path / "cut", path.read_bytes()[:-60]), 16)
    assert cut.seconds == [0, 1, 2]
    assert cut.note.startswith("the file is cut short or damaged: read ")


def test_one_picture_is_one_frame(tmp_path):
    clip = read_clip(saved(tmp_path / "a.jpg", tiny.picture(70)), 16)
    assert clip.frames.shape == (1, 3, 16, 16)
    assert clip.still
    assert clip.seconds == [0]


def test_a_folder_is_read_in_natural_order_and_over_broken_pictures(tmp_path):
    for i in (1, 2, 3, 10, 11):
        saved(tmp_path / f"frame{i}.jpg", tiny.picture(10 * i))
    (tmp_path / "notes.txt").write_text("not a picture")
    assert grey(read_clip(tmp_path, 16)) == [1, 2, 3, 10, 11]
    assert grey(read_clip(tmp_path, 16, max_frames=3)) == [1, 3, 11]
    saved(tmp_path / "frame3.jpg", tiny.picture(30)[:100])
    clip = read_clip(tmp_path, 16)
    assert grey(clip) == [1, 2, 10, 11]
    assert clip.seconds == [0, 1, 3, 4]
    assert clip.note.startswith("1 of 5 pictures left out, the first is frame3.jpg")


def test_mistakes_are_one_line(tmp_path):
    film = saved(tmp_path / "film.mp4", tiny.video(2))
    (tmp_path / "empty").mkdir()
    tiny.noise(3, tmp_path / "late.mp4")  # its index is at the end
    cut = (tmp_path / "late.mp4").read_bytes()[:-4000]
    for path, said in {
        tmp_path / "flim.mp4": "did you mean 'film.mp4'?",
        tmp_path / "nowhere" / "film.mp4": f"film.mp4: no folder {tmp_path}/nowhere",
        "https://example.org/film.mp4": "download it first",
        tmp_path / "empty": "holds no pictures",
        saved(tmp_path / "a.mp4", b""): "is empty",
        saved(tmp_path / "b.mp4", b"It was a dark and stormy night"): "is no video or picture",
        saved(tmp_path / "c.mp4", b"#EXTM3U\n/etc/passwd"): "is no video or picture",
        saved(tmp_path / "d.mp4", cut): "has lost its index",
        saved(tmp_path / "e.png", tiny.png_header(60_000, 60_000)): "50 million pixels",
        saved(tmp_path / "f.webm", film.read_bytes()[:40]): "decodes",
        "/dev/null": "neither a file nor a folder",
    }.items():
        with pytest.raises(UserError) as error:
            read_clip(path, 16)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_a_camera_gives_one_frame_a_second_and_a_missing_one_is_an_error(tmp_path):
    film = saved(tmp_path / "film.mp4", tiny.video(4))
    frames = list(tolerant.camera(str(film), 16))
    assert [round(float(frame.float().mean()) / 10) for frame in frames] == [0, 1, 2, 3]
    with pytest.raises(SampleError, match="no camera 97"):
        next(tolerant.camera("97", 16))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile film.mp4")  # FFmpeg would open what it names
    with pytest.raises(SampleError, match="is neither a video nor a camera"):
        next(tolerant.camera(str(tmp_path / "list.mp4"), 16))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_photo_is_shown_as_the_telephone_was_held(tmp_path, name, turn):
    corners = Image.fromarray(np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[tolerant.ORIENTATION] = turn
    corners.convert("RGB").save(tmp_path / name, exif=exif, quality=95)
    with Image.open(tmp_path / name) as stored:
        meant = np.asarray(ImageOps.exif_transpose(stored).convert("L").resize((2, 2), Image.Resampling.BOX), np.int64)
    seen = read_clip(tmp_path / name, 32).frames[0, 0].float().reshape(2, 16, 2, 16).mean((1, 3)).numpy()
    assert np.abs(seen - meant).max() < 10


def test_a_picture_in_memory_is_that_of_its_file(tmp_path):
    """Photos upright and transparency on white, whether a path is given or what Pillow has opened."""
    pixels = np.zeros((16, 32, 4), np.uint8)
    pixels[:8, :, 0], pixels[:, :16, 3] = 200, 255
    exif = Image.Exif()
    exif[tolerant.ORIENTATION] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "a.webp", exif=exif, lossless=True)
    Image.fromarray(pixels[:, :, :3]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    for name, near in (("a.png", 0), ("a.webp", 0), ("a.jpg", 4)):  # a JPEG has two decoders here
        with Image.open(tmp_path / name) as picture:
            ours = decode.fit(tolerant.pixels_of(picture), 16).astype(int)
        from_file = read_clip(tmp_path / name, 16).frames[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - from_file).max() <= near, name


def test_a_last_picture_that_stays_is_not_called_missing(tmp_path):
    with av.open(str(tmp_path / "slides.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        pictures = (np.full((16, 16, 3), 10 * i, np.uint8) for i in range(11))
        packets = [p for x in pictures for p in stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24"))]
        packets += stream.encode()
        packets[-1].duration = round(10 / packets[-1].time_base)
        container.mux(packets)
    with av.open(str(tmp_path / "slides.mp4")) as container:
        assert tolerant._claimed_seconds(container, container.streams.video[0]) > 15
    assert read_clip(tmp_path / "slides.mp4", 16).note == ""


def test_a_trimmed_film_is_not_called_cut_short(tmp_path):
    """Trimmed without encoding again, as telephones do: what lies ahead of the beginning is still in the file."""
    (tmp_path / "whole.mp4").write_bytes(tiny.video(20, size=32))
    trimmed = tmp_path / "trimmed.mp4"
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(trimmed), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                ahead = round(8 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - ahead, packet.dts - ahead, stream
                container.mux(packet)
    with av.open(str(trimmed)) as container:
        assert container.streams.video[0].frames == 100  # all twenty seconds are stored
    clip = read_clip(trimmed, 16)
    assert (len(clip.frames), clip.note) == (12, "")


def test_a_path_that_the_system_refuses_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"\.\.\. cannot be read: File name too long"):
        read_clip(tmp_path / ("x" * 300), 16)


def test_a_folder_of_clips_is_listed_and_numbered_frames_are_one_clip(tmp_path):
    for n in (1, 2, 10):
        (tmp_path / "frames" / f"val7.{n}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "frames" / f"val7.{n}.jpg").write_bytes(tiny.picture(n))
    assert list_clips(tmp_path / "frames") == [tmp_path / "frames"]
    (tmp_path / "b.mp4").write_bytes(tiny.video(2, size=32))
    (tmp_path / "notes.txt").write_text("no clip")
    (tmp_path / "empty").mkdir()
    assert list_clips(tmp_path) == [tmp_path / "b.mp4", tmp_path / "frames"]
    (tmp_path / "frames" / "cat.jpg").write_bytes(tiny.picture(3))
    assert len(list_clips(tmp_path / "frames")) == 4  # pictures of their own
