"""WebVid and similar data sets: captions in JSON, JSONL, CSV or a JSON beside each mp4.

WebVid's own CSV has `videoid`, `name` (the caption) and `page_dir`, with videos at PAGE_DIR/VIDEOID.mp4; video2dataset
writes KEY.mp4 with KEY.json (`caption`, `videoid`) beside it. Sources: the WebVid page, video2dataset's README.
"""

from collections.abc import Iterator
from pathlib import Path

from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.frames import find_video, video_frames
from fovlm.prepare.job import Job, NewSample, RawSource

VIDEO = ("video", "file_name", "video_name", "videoid", "video_id", "id", "file")  # `file`: the name of a sidecar
CAPTION = ("caption", "name", "text")


def make(row: Row, job: Job) -> Iterator[NewSample]:
    """A caption without a question."""
    record = {"user": "", "assistant": str(pick(row, *CAPTION)).strip(), "source": "webvid"}
    yield NewSample(record, video_frames(_video(row, job), job))


def _video(row: Row, job: Job) -> Path:
    if file := row.get("file"):  # a sidecar has the name of its video
        return find_video(Path(str(file)).with_suffix(""), job)
    name = str(pick(row, *VIDEO))
    folder = row.get("page_dir")
    try:
        return find_video(f"{folder}/{name}" if folder else name, job)
    except SampleError:
        if not folder:
            raise
        return find_video(name, job)


SOURCE = RawSource(
    name="webvid",
    kind="video",
    formats=("csv", "jsonl", "json", "parquet"),
    required=(VIDEO, CAPTION),
    columns=(*VIDEO, *CAPTION, "page_dir"),
    make=make,
    prompt="Describe the video.",
    sidecars=True,
)
