"""A folder of videos and a list of what to say about them: {video, question, answer} a line, JSONL or CSV."""

from collections.abc import Iterator

from fovlm.data.tables import Row, pick
from fovlm.prepare.frames import find_video, video_frames
from fovlm.prepare.job import Job, Made, RawSource


def make(row: Row, job: Job) -> Iterator[Made]:
    """A question (which may be missing) and its answer; `source` is taken over where there is one."""
    answer = str(pick(row, "answer", "caption", "assistant")).strip()
    question = str(row.get("question") or row.get("user") or "").strip()
    record = {"user": question, "assistant": answer, "source": str(row.get("source") or "videos")}
    yield Made(record, video_frames(find_video(pick(row, "video", "file"), job), job))


NEEDS = (("video", "file"), ("answer", "caption", "assistant"))
SOURCE = RawSource("videos", "video", ("jsonl", "csv", "json"), NEEDS, (), make, "Describe the video.")
