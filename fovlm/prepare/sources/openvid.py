"""OpenVid-1M: one CSV (`video`, `caption`, and scores) and a folder of mp4 files. Source: its dataset card."""

from collections.abc import Iterator

from fovlm.data.tables import Row, pick
from fovlm.prepare.frames import find_video, video_frames
from fovlm.prepare.job import Job, Made, RawSource


def make(row: Row, job: Job) -> Iterator[Made]:
    """A caption without a question."""
    caption = str(pick(row, "caption")).strip()
    yield Made(
        {"user": "", "assistant": caption, "source": "openvid"}, video_frames(find_video(pick(row, "video"), job), job)
    )


SOURCE = RawSource(
    "openvid",
    "video",
    ("csv", "parquet"),
    (("video",), ("caption",)),
    ("video", "caption"),
    make,
    "Describe the video.",
    whole="OpenVid-1M.csv",  # beside it the card has OpenVidHD.csv, a part of it
)
