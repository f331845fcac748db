"""One question of an exam, whatever benchmark it comes from, and the frames it shows.

A question about a video, a picture or nothing; options to choose from, or one answer whose loss is measured.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest
from fovlm.media import decode as media
from fovlm.media import tolerant
from fovlm.media.clip import read_clip

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKED = re.compile(r"^\s*\(?([A-Z])\s*[.):]\s*")
LONGEST = 3600  # seconds of a video that a part is cut from
FOLDER_FPS = 3.0  # MVBench's folders of frames hold three for each second


@dataclass(frozen=True)
class EvalQuestion:
    """`media` are files (Path) or the bytes of pictures, all shown; `part` is (from, to) in seconds of a video.

    `answer` is the number of the right one of `options`. A question with one option is scored by its loss alone.
    """

    id: str
    category: str
    media: tuple[Path | bytes, ...]
    question: str
    options: tuple[str, ...]
    answer: int
    part: tuple[float, float] | None = None
    extra: dict[str, str] = field(default_factory=dict)  # other ways to sort it, e.g. {"duration": "short"}

    def asked(self, letters: bool) -> str:
        """The words of the question; with `letters` the options are listed below it."""
        if not letters:
            return self.question
        listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(self.options))
        return f"{self.question}\n{listed}\nAnswer with the letter."

    def answers(self, letters: bool) -> list[str]:
        """What the model would say for each option."""
        return list(LETTERS[: len(self.options)]) if letters else list(self.options)

    @property
    def missing(self) -> Path | None:
        """The first file that is not there."""
        return next((m for m in self.media if isinstance(m, Path) and not m.exists()), None)

    @property
    def shown(self) -> str:
        """Names what is shown: two questions about one clip have the same."""
        names = [m.name if isinstance(m, Path) else digest(m) for m in self.media]
        return json.dumps([names, self.part])


def unmarked(options: Sequence[str]) -> tuple[str, ...]:
    """Options without the letters that some benchmarks write ahead of them: "A. Apples." -> "Apples."."""
    found = [MARKED.match(option) for option in options]
    if all(m and m.group(1) == LETTERS[i] for i, m in enumerate(found)):
        return tuple(MARKED.sub("", option) for option in options)
    return tuple(options)


def frames_of(question: EvalQuestion, size: int, most: int) -> Tensor:
    """What a question shows -> u8 [f, 3, size, size]: a frame a second of a video, at most `most`; f is 0 for none.

    Raises UserError naming the question for what cannot be read, or only in part.
    """
    parts = [_frames(m, question, size, most) for m in question.media]
    if not parts:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    frames = torch.cat(parts)
    return frames[media.spread(len(frames), most)]


def _frames(shown: Path | bytes, question: EvalQuestion, size: int, most: int) -> Tensor:
    if isinstance(shown, bytes):
        file = BytesIO(shown)
        kind = tolerant.kind_of(file)
        try:
            if kind is None:
                raise SampleError("neither a video nor a picture")
            seen = tolerant.decode_some(file, kind, size, 1)
        except SampleError as error:
            raise UserError(f"question {question.id}: its picture cannot be read: {error}") from error
        if seen.note:
            raise UserError(f"question {question.id}: its picture cannot be read: {seen.note}")
        return seen.frames
    try:
        clip = read_clip(shown, size, most if question.part is None else LONGEST)
    except UserError as error:
        raise UserError(f"question {question.id}: {error}") from error
    if clip.note:  # what is left of it is not what was asked about
        raise UserError(f"question {question.id}: {shown}: {clip.note}")
    if question.part is None:
        return clip.frames
    scale = FOLDER_FPS if shown.is_dir() else 1.0
    begin, end = question.part
    if begin > clip.seconds[-1] / scale + 1:
        raise UserError(f"question {question.id}: {shown} ends before second {begin:g}, where its part begins")
    inside = [n for n, second in enumerate(clip.seconds) if begin - 0.5 <= second / scale <= end + 0.5]
    inside = inside or [min(range(len(clip.seconds)), key=lambda n: abs(clip.seconds[n] / scale - begin))]
    return clip.frames[[inside[n] for n in media.spread(len(inside), most)]]


def hash_of(questions: Sequence[EvalQuestion]) -> str:
    """Names a set: what is asked, offered, right, and shown (files by name and size, pictures by content)."""
    hashed = hashlib.blake2b(digest_size=16)
    for q in questions:
        sizes = [m.stat().st_size if isinstance(m, Path) and m.is_file() else 0 for m in q.media]
        told = [q.id, q.category, q.question, q.options, q.answer, q.shown, sizes]
        hashed.update(json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return hashed.hexdigest()


def drawn(questions: list[EvalQuestion], limit: int | None) -> list[EvalQuestion]:
    """`limit` questions drawn by the hash of their ids, so from all categories, the same every time; in order."""
    if limit is None or limit >= len(questions):
        return questions
    ranked = sorted(range(len(questions)), key=lambda n: hashlib.blake2b(questions[n].id.encode()).digest())
    return [questions[n] for n in sorted(ranked[:limit])]
