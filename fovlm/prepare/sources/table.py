"""Tables with a file, a question and an answer in each row: `table` with the columns that you name, and published sets.

A column may be a key in one (`json.title`). Where question and answer are lists, they are several conversations.
A file is a name below --media, {bytes, path}, or bytes. Neighbours about the same file (in a JSON list: all rows)
become one sample with several conversations. Rows without a file are text.
"""

from functools import partial
from typing import Any

from fovlm.data.tables import Row, pick, value_at
from fovlm.errors import SampleError, UserError
from fovlm.prepare.conversations import Conversation, combine, listed
from fovlm.prepare.job import Job, NewSample, RawSource, Record

FORMATS = ("jsonl", "csv", "parquet", "json")
Columns = dict[str, tuple[str, ...]]  # video, image, question, answer -> its column, with alternative names


def make(columns: Columns, row: Row, job: Job) -> NewSample:
    """The questions about one file."""
    return combine(row["rows"], job, partial(read, columns))


def read(columns: Columns, row: Row, job: Job) -> Conversation:
    """A row of a table. Raises SampleError."""
    named = [(kind, name) for kind in ("image", "video") for name in columns.get(kind, ())]
    files = [(kind, one) for kind, name in named for one in listed(value_at(row, name))]
    question = next((value for name in columns.get("question", ()) if (value := value_at(row, name))), "")
    answer = pick(row, *columns["answer"])
    if not isinstance(answer, list):
        return Conversation(_exchange(question, answer), files)
    questions = question if isinstance(question, list) else [question] * len(answer)
    if len(questions) != len(answer):
        raise SampleError("not as many answers as questions")
    return Conversation({"conversations": list(map(_exchange, questions, answer))}, files)


def _exchange(question: Any, answer: Any) -> Record:
    return {"user": str(question or "").strip(), "assistant": "" if answer is None else str(answer).strip()}


def source_for(job: Job) -> RawSource:
    """The source `table` of a job. Raises UserError."""
    columns: Columns = {part: (name,) for part, name in job.columns}
    if "answer" not in columns:
        raise UserError("table: --answer COLUMN is missing, and --video or --image and --question where there are any")
    return source("table", "mixed", columns, FORMATS, max_bad=0.1)


def source(name: str, kind: str, columns: Columns, formats: tuple[str, ...], **more) -> RawSource:
    """A source of tables with these columns; only the question may be missing."""
    return RawSource(
        name=name,
        kind=kind,
        formats=formats,
        required=tuple(names for part, names in columns.items() if part != "question" or name == "table"),
        columns=(*(name for names in columns.values() for name in names), "source"),
        make=partial(make, columns),
        same=(*columns.get("video", ()), *columns.get("image", ())) or ("",),  # a column without values: each row alone
        **more,
    )


VIDEOS = source(
    "videos",
    "video",
    {"video": ("video", "file"), "answer": ("answer", "caption", "assistant"), "question": ("question", "user")},
    ("jsonl", "csv", "json"),
    prompt="Describe the video.",
)
OPENVID = source(
    "openvid",
    "video",
    {"video": ("video",), "answer": ("caption",)},
    ("csv", "parquet"),
    prompt="Describe the video.",
    complete="OpenVid-1M.csv",  # OpenVidHD.csv beside it is a part of it
)
