"""A folder of videos and a list of questions and answers: {video, question, answer} per line, JSONL or CSV."""

from collections.abc import Iterator

from fovlm.data.tables import Row, pick
from fovlm.prepare.frames import find_video, video_frames
from fovlm.prepare.job import Job, NewSample, RawSource


def make(row: Row, job: Job) -> Iterator[NewSample]:
    """An answer, with its question if there is one."""
    answer = str(pick(row, "answer", "caption", "assistant")).strip()
    question = str(row.get("question") or row.get("user") or "").strip()
    record = {"user": question, "assistant": answer, "source": str(row.get("source") or "videos")}
    yield NewSample(record, video_frames(find_video(pick(row, "video", "file"), job), job))


SOURCE = RawSource(
    name="videos",
    kind="video",
    formats=("jsonl", "csv", "json"),
    required=(("video", "file"), ("answer", "caption", "assistant")),
    columns=(),
    make=make,
    prompt="Describe the video.",
)
