"""The Cauldron: parquet files with `images` [{bytes, path}] and `texts` [{user, assistant, source}]. Source: its card.

Each exchange about a picture is a sample of its own, because a sample is one question and one answer and most subsets
ask independent questions. Rows with several pictures are rejected: a sample has one picture, or frames in time.
"""

from collections.abc import Iterator

from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.frames import picture
from fovlm.prepare.job import Job, NewSample, RawSource


def make(row: Row, job: Job) -> Iterator[NewSample]:
    """The picture with each of its exchanges, or the first."""
    images, texts = pick(row, "images"), pick(row, "texts")
    if not isinstance(images, list):
        raise SampleError("images are not a list")
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        raise SampleError("texts are not a list of {user, assistant, source}")
    if len(images) != 1:
        raise SampleError("several pictures in one row" if len(images) > 1 else "no picture")
    if not texts:
        raise SampleError("no texts")
    jpeg = picture(images[0], job)
    for text in texts[:1] if job.turns == "first" else texts:
        record = {part: str(text.get(part) or "").strip() for part in ("user", "assistant", "source")}
        yield NewSample(record | {"source": record["source"] or "cauldron"}, [jpeg], still=True)


SOURCE = RawSource(
    name="cauldron",
    kind="image",
    formats=("parquet",),
    required=(("images",), ("texts",)),
    columns=("images", "texts"),
    make=make,
    prompt="Describe the picture.",
    turns="each",
)
