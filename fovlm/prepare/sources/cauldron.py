"""The Cauldron and FineVision: parquet with `images` [{bytes, path}] and `texts` [{user, assistant}].

All exchanges about a picture become one sample with several conversations, because most subsets ask independent
questions. FineVision rates each exchange in `relevance_ratings` and so on;
`--rating relevance=4` keeps those with at least 4. Rows with several pictures are rejected: a sample has one picture,
or frames in time. Sources: their cards.
"""

from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.frames import picture
from fovlm.prepare.job import Job, NewSample, RawSource

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")


def make(row: Row, job: Job) -> NewSample:
    """The picture with its exchanges."""
    images, texts = pick(row, "images"), pick(row, "texts")
    if not isinstance(images, list):
        raise SampleError("images are not a list")
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        raise SampleError("texts are not a list of {user, assistant}")
    if len(images) != 1:
        raise SampleError("several pictures in one row" if len(images) > 1 else "no picture")
    if not texts:
        raise SampleError("no texts")
    for name, least in job.ratings:
        rated = row.get(f"{name}_ratings")
        if not isinstance(rated, list) or len(rated) != len(texts):
            raise SampleError(f"no {name}_ratings for each of the texts")
        texts = [text if one is not None and one >= least else {} for text, one in zip(texts, rated, strict=True)]
    if not (texts := [text for text in texts if text]):
        raise SampleError("rated too low")
    records = [{part: str(text.get(part) or "").strip() for part in ("user", "assistant")} for text in texts]
    source = {"source": str(texts[0].get("source") or row.get("source") or job.source).strip()}
    record = records[0] if len(records) == 1 else {"conversations": records}
    return NewSample(record | source, [picture(images[0], job)], still=True)


SOURCES = [
    RawSource(
        name=name,
        kind="image",
        formats=("parquet",),
        required=(("images",), ("texts",)),
        columns=("images", "texts", "source", *(f"{rating}_ratings" for rating in RATINGS)),
        make=make,
        prompt="Describe the picture.",
    )
    for name in ("cauldron", "finevision")
]
