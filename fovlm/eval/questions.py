"""A question of any benchmark, and the frames that belong to it."""

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
from fovlm.media import decode, tolerant
from fovlm.media.clip import read_clip

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERED = re.compile(r"^\s*\(?([A-Z])\s*[.):]\s*")
LONGEST = 3600  # seconds of a video that segments are cut from
FOLDER_FPS = 3.0  # frames a second in MVBench's folders of frames


@dataclass(frozen=True)
class EvalQuestion:
    """A multiple-choice question. `media` are files (Path) or the bytes of pictures, none for text only."""

    id: str
    category: str
    media: tuple[Path | bytes, ...]
    question: str
    options: tuple[str, ...]
    answer: int  # number of the right option
    segment: tuple[float, float] | None = None  # seconds of the video, from and to
    extra: dict[str, str] = field(default_factory=dict)  # other ways to group it, e.g. {"duration": "short"}

    def prompt(self, letters: bool) -> str:
        """The text of the question; with `letters` it lists the options."""
        if not letters:
            return self.question
        listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(self.options))
        return f"{self.question}\n{listed}\nAnswer with the letter."

    def answers(self, letters: bool) -> list[str]:
        """The model's answer for each option: its letter or its text."""
        return list(LETTERS[: len(self.options)]) if letters else list(self.options)

    @property
    def missing(self) -> Path | None:
        """The first file that does not exist."""
        return next((m for m in self.media if isinstance(m, Path) and not m.exists()), None)

    @property
    def media_key(self) -> str:
        """Identifies the media: the same for two questions about one clip."""
        names = [m.name if isinstance(m, Path) else digest(m) for m in self.media]
        return json.dumps([names, self.segment])


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Options without the letters that some benchmarks put before them: "A. Apples." -> "Apples."."""
    found = [LETTERED.match(option) for option in options]
    if all(m and m.group(1) == LETTERS[i] for i, m in enumerate(found)):
        return tuple(LETTERED.sub("", option) for option in options)
    return tuple(options)


def frames_of(question: EvalQuestion, size: int, max_frames: int) -> Tensor:
    """The frames of a question, u8 [f, 3, size, size]: one a second of a video, at most `max_frames`; f = 0 for text.
    Raises UserError naming the question when its media cannot be read completely."""
    try:
        parts = [
            _picture(media, size) if isinstance(media, bytes) else _clip(media, question.segment, size, max_frames)
            for media in question.media
        ]
    except UserError as error:
        raise UserError(f"question {question.id}: {error}") from error
    if not parts:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    frames = torch.cat(parts)
    return frames[decode.spread(len(frames), max_frames)]


def _picture(data: bytes, size: int) -> Tensor:
    file = BytesIO(data)
    try:
        if (kind := tolerant.kind_of(file)) is None:
            raise SampleError("neither a video nor a picture")
        decoded = tolerant.decode_some(file, kind, size, 1)
        if decoded.note:
            raise SampleError(decoded.note)
    except SampleError as error:
        raise UserError(f"its picture cannot be read: {error}") from error
    return decoded.frames


def _clip(path: Path, segment: tuple[float, float] | None, size: int, max_frames: int) -> Tensor:
    clip = read_clip(path, size, max_frames if segment is None else LONGEST)
    if clip.note:  # the question is about the whole video
        raise UserError(f"{path}: {clip.note}")
    if segment is None:
        return clip.frames
    (begin, end), fps = segment, FOLDER_FPS if path.is_dir() else 1.0
    seconds = [second / fps for second in clip.seconds]
    if begin > seconds[-1] + 1:
        raise UserError(f"{path} ends before second {begin:g}, the start of the segment")
    inside = [n for n, second in enumerate(seconds) if begin - 0.5 <= second <= end + 0.5]
    inside = inside or [min(range(len(seconds)), key=lambda n: abs(seconds[n] - begin))]
    return clip.frames[[inside[n] for n in decode.spread(len(inside), max_frames)]]


def hash_questions(questions: Sequence[EvalQuestion]) -> str:
    """Identifies a set: questions, options, answers and media (files by name and size, pictures by content)."""
    hashed = hashlib.blake2b(digest_size=16)
    for q in questions:
        sizes = [m.stat().st_size if isinstance(m, Path) and m.is_file() else 0 for m in q.media]
        content = [q.id, q.category, q.question, q.options, q.answer, q.media_key, sizes]
        hashed.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return hashed.hexdigest()


def subset(questions: list[EvalQuestion], limit: int | None) -> list[EvalQuestion]:
    """`limit` questions chosen by the hash of their ids, so from all categories and always the same ones; in order."""
    if limit is None or limit >= len(questions):
        return questions
    ranked = sorted(range(len(questions)), key=lambda n: hashlib.blake2b(questions[n].id.encode()).digest())
    return [questions[n] for n in sorted(ranked[:limit])]
