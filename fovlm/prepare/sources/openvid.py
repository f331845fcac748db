"""OpenVid-1M: one CSV (`video`, `caption`, and scores) and a folder of mp4 files. Source: its dataset card."""

from collections.abc import Iterator

from fovlm.data.tables import Row, pick
from fovlm.prepare.frames import find_video, video_frames
from fovlm.prepare.job import Job, NewSample, RawSource


def make(row: Row, job: Job) -> Iterator[NewSample]:
    """A caption without a question."""
    record = {"user": "", "assistant": str(pick(row, "caption")).strip(), "source": "openvid"}
    yield NewSample(record, video_frames(find_video(pick(row, "video"), job), job))


SOURCE = RawSource(
    name="openvid",
    kind="video",
    formats=("csv", "parquet"),
    required=(("video",), ("caption",)),
    columns=("video", "caption"),
    make=make,
    prompt="Describe the video.",
    complete="OpenVid-1M.csv",  # OpenVidHD.csv beside it is a part of it
)
