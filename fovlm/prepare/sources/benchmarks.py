"""MVBench, Video-MME, ScienceQA and POPE as shards, with the readers of `fovlm eval`.

The right option is the answer of a sample; all options, the number of the right one and the category stay in its
record. Shards hold one kind of sample, so ScienceQA's questions without a picture are rejected.
"""

from fovlm.data.tables import Row
from fovlm.errors import SampleError, UserError
from fovlm.eval.benchmarks import read_questions
from fovlm.eval.questions import EvalQuestion, frames_of
from fovlm.prepare.frames import jpegs
from fovlm.prepare.job import Job, NewSample, RawSource

KINDS = {"mvbench": "video", "videomme": "video", "scienceqa": "image", "pope": "image"}


def make(row: Row, job: Job) -> NewSample:
    """One question."""
    question: EvalQuestion = row["question"]
    if not question.media:
        raise SampleError("no picture")
    if question.missing is not None:
        raise SampleError("no such video or picture file")
    try:
        frames = frames_of(question, job.size, job.max_frames)
    except UserError as error:
        raise SampleError("video or picture undecodable or cut short") from error
    record = {
        "user": question.question,
        "assistant": question.options[question.answer],
        "source": job.source,
        "options": list(question.options),
        "answer": question.answer,
        "category": question.category,
        "id": question.id,
    }
    return NewSample(record, jpegs(frames, job), still=KINDS[job.source] == "image")


def _rows(job: Job) -> list[Row]:
    """All questions. Raises UserError, also for missing files unless `skip_missing`."""
    questions = read_questions(job.source, job.raw)
    missing = [question.missing for question in questions if question.missing is not None]
    if missing and (not job.skip_missing or len(missing) == len(questions)):
        message = (
            f"{job.raw}: the files of {len(missing)} of {len(questions)} questions are missing, first {missing[0]}"
        )
        raise UserError(message + ("" if len(missing) == len(questions) else "; --skip-missing skips them"))
    return [{"question": question} for question in questions]


SOURCES = [RawSource(name, kind, (), (), (), make, rows=_rows) for name, kind in KINDS.items()]
