"""LLaVA's JSON, and the many data sets that follow it: a list of {image or video, conversations: [{from, value}]}.

    {"image": "coco/000.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                {"from": "gpt", "value": "A dog."}]}

Files are below --media. The mark `<image>` or `<video>` is in the first question and is taken out: the frames have
their place there. Rows about the same file, wherever they are in the list, become one sample with several
conversations; rows without a file are text. Sources: LLaVA's data page, LLaVA-Video-178K's card.
"""

from fovlm.data.record import MARK, ROLES, messages_of
from fovlm.data.tables import Row, pick
from fovlm.errors import SampleError
from fovlm.prepare.conversations import Conversation, combine, listed, record_of
from fovlm.prepare.job import Job, NewSample, RawSource


def make(row: Row, job: Job) -> NewSample:
    """The conversations about one file."""
    return combine(row["rows"], job, read)


def read(row: Row, job: Job) -> Conversation:
    """A row with `conversations`. Raises SampleError."""
    turns = pick(row, "conversations")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise SampleError("conversations are not a list of {from, value}")
    files = [(kind, one) for kind in ("image", "video") for one in listed(row.get(kind))]
    marks = [len(MARK.findall(turn["value"])) for turn in turns]
    asked = next((n for n, turn in enumerate(turns) if ROLES.get(str(turn.get("from"))) == "user"), 0)
    if marks and (sum(marks) != len(files) or marks[asked] != sum(marks)):
        raise SampleError("the marks <image> and <video> do not fit the files")
    return Conversation(record_of(messages_of(turns)), files)


SOURCE = RawSource(
    name="llava",
    kind="mixed",
    formats=("json", "jsonl", "parquet"),
    required=(("conversations",),),
    columns=("conversations", "image", "video", "source"),
    make=make,
    same=("image", "video"),
    max_bad=0.1,
)
