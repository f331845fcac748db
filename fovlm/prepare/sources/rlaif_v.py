"""RLAIF-V: `image` {bytes, path}, `question`, `chosen`, `rejected` in parquet or JSONL. Source: its dataset card."""

from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.frames import picture
from fovlm.prepare.job import Job, NewSample, RawSource


def make(row: Row, job: Job) -> NewSample:
    """A pair of answers to one question about one picture."""
    question, chosen, rejected = (str(pick(row, name)).strip() for name in ("question", "chosen", "rejected"))
    if chosen == rejected:
        raise SampleError("chosen and rejected are the same")
    jpeg = picture(pick(row, "image", "image_path"), job)
    source = str(row.get("origin_dataset") or row.get("ds_name") or "rlaif-v")
    return NewSample({"user": question, "chosen": chosen, "rejected": rejected, "source": source}, [jpeg], still=True)


SOURCE = RawSource(
    name="rlaif-v",
    kind="preference",
    formats=("parquet", "jsonl"),
    required=(("image", "image_path"), ("question",), ("chosen",), ("rejected",)),
    columns=("image", "image_path", "question", "chosen", "rejected", "origin_dataset", "ds_name"),
    make=make,
)
