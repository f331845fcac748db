"""The published annotation files of MVBench, Video-MME, ScienceQA and POPE -> questions.

A reader takes the folder as it was downloaded (or one annotation file) and yields every question in order; videos and
pictures that are not there are found missing later, all at once. Formats as their authors publish them:

    MVBench    json/TASK.json: [{"video", "question", "candidates", "answer" (a text), "start"?, "end"?}], video/...
    Video-MME  videomme/test-*.parquet: question_id, videoID, duration, domain, task_type, question,
               options ["A. ..", ..], answer "C"; the videos are videoID.mp4
    ScienceQA  *.parquet: image {bytes} or null, question, choices, answer (a number), hint, subject, topic ..
    POPE       coco_pope_{random,popular,adversarial}.json, JSON lines: question_id, image (a file), text, label;
               or the parquet edition: id, question, answer, image, category
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fovlm.errors import UserError, nearest
from fovlm.exams.question import LETTERS, Question, unmarked
from fovlm.prepare import tables

FILMS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif", ".flv", ".jpg", ".jpeg", ".png")
# Where MVBench keeps the videos of a task: several of its sources use the same file names.
MVBENCH_FOLDERS = {
    "action_sequence": "star/Charades", "action_prediction": "star/Charades", "object_interaction": "star/Charades",
    "action_antonym": "ssv2_video", "fine_grained_action": "Moments_in_Time_Raw", "unexpected_action": "FunQA_test",
    "object_existence": "clevrer", "moving_direction": "clevrer", "moving_count": "clevrer",
    "moving_attribute": "clevrer", "counterfactual_inference": "clevrer", "object_shuffle": "perception",
    "action_count": "perception", "state_change": "perception", "character_order": "perception",
    "action_localization": "sta/sta_video", "scene_transition": "scene_qa", "fine_grained_pose": "nturgbd",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa",
}  # fmt: skip


def mvbench(where: Path) -> Iterator[Question]:
    """Every task of MVBench, or the task of one JSON file. Raises UserError."""
    files = [where] if where.is_file() else sorted((where / "json").glob("*.json")) or sorted(where.glob("*.json"))
    if not files:
        raise _nothing(where, "json/TASK.json (a list of questions for each task)")
    root = where.parent.parent if where.is_file() and where.parent.name == "json" else where
    root = root.parent if root.is_file() else root
    for file in files:
        for number, row in enumerate(_json_list(file)):
            name, text, options, answer = _columns(file, number, row, "video", "question", "candidates", "answer")
            if answer not in options:
                raise UserError(f"{file}, question {number}: its answer '{answer}' is not one of its candidates")
            part = (float(row.get("start") or 0), float(row["end"])) if row.get("end") is not None else None
            yield Question(
                id=f"{file.stem}/{number}",
                category=file.stem,
                media=(_find(root, name, MVBENCH_FOLDERS.get(file.stem, "")),),
                question=text.strip(),
                options=tuple(map(str, options)),
                answer=options.index(answer),
                part=part,
            )


def videomme(where: Path) -> Iterator[Question]:
    """Video-MME without its subtitles. Raises UserError."""
    root = where.parent if where.is_file() else where
    for file, number, row in _parquet(where, ("question", "options", "answer")):
        text, options, answer = _columns(file, number, row, "question", "options", "answer")
        name = str(row.get("videoID") or row.get("video_id"))
        yield Question(
            id=str(row.get("question_id") or number),
            category=str(row.get("task_type") or "all"),
            media=(_find(root, f"{name}.mp4", ""),),
            question=text.strip(),
            options=unmarked(options),
            answer=_letter(answer, len(options), file, number),
            extra={k: str(row[k]) for k in ("duration", "domain") if row.get(k)},
        )


def scienceqa(where: Path) -> Iterator[Question]:
    """ScienceQA with its hints ahead of the questions; the test split where the files tell. Raises UserError."""
    for file, number, row in _parquet(where, ("question", "choices", "answer")):
        text, options, answer = _columns(file, number, row, "question", "choices", "answer")
        image = row.get("image")
        data = image.get("bytes") if isinstance(image, dict) else image
        hint = str(row.get("hint") or "").strip()
        if not isinstance(answer, int) or not 0 <= answer < len(options):
            raise UserError(
                f"{file}, row {number}: its answer {answer!r} is not a number of its {len(options)} choices"
            )
        yield Question(
            id=f"{file.stem}/{number}",
            category=str(row.get("subject") or "all"),
            media=(bytes(data),) if data else (),
            question=f"{hint}\n{text.strip()}" if hint else text.strip(),
            options=tuple(map(str, options)),
            answer=answer,
            extra={k: str(row[k]) for k in ("topic", "grade") if row.get(k)}
            | {"shows": "a picture" if data else "text only"},
        )


def pope(where: Path) -> Iterator[Question]:
    """POPE's yes and no questions, of all its files. Raises UserError."""
    lines = [where] if where.is_file() else sorted(p for e in ("json", "jsonl") for p in where.rglob(f"*pope*.{e}"))
    lines = [file for file in lines if file.suffix != ".parquet"]
    if not lines:
        yield from _pope_parquet(where)
        return
    for file in lines:
        category = next((c for c in ("random", "popular", "adversarial") if c in file.stem), file.stem)
        for number, row in enumerate(_json_lines(file)):
            name, text, label = _columns(file, number, row, "image", "text", "label")
            key = f"{category}/{row.get('question_id', number)}"
            yield _yes_or_no(key, category, _find(file.parent, name, ""), text, label, file, number)


def _pope_parquet(where: Path) -> Iterator[Question]:
    for file, number, row in _parquet(where, ("question", "answer", "image")):
        text, label, image = _columns(file, number, row, "question", "answer", "image")
        category = str(row.get("category") or "all")
        data = bytes(image["bytes"] if isinstance(image, dict) else image)
        yield _yes_or_no(f"{category}/{row.get('id', number)}", category, data, text, label, file, number)


def _yes_or_no(key: str, category: str, shown: Path | bytes, text: str, label: str, file: Path, n: int) -> Question:
    if (said := label.strip().lower()) not in ("yes", "no"):
        raise UserError(f"{file}, question {n}: its label is yes or no, not '{label}'")
    return Question(key, category, (shown,), text.strip(), ("yes", "no"), ("yes", "no").index(said))


READERS: dict[str, Callable[[Path], Iterator[Question]]] = {
    "mvbench": mvbench, "videomme": videomme, "scienceqa": scienceqa, "pope": pope,
}  # fmt: skip


def _json_list(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} is not a JSON list of questions")
    return rows


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one JSON object a line. Raises UserError with the line's number from 1."""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is not a JSON object with one question")
        yield row


def _parquet(where: Path, needs: tuple[str, ...]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, row number, row) of the test split's tables, or of all when no name says so. Raises UserError."""
    files = tables.find_tables(where, ("parquet",))
    files = [f for f in files if "test" in f.stem.lower()] or files
    for file in files:
        number = 0
        for block in tables.blocks_of(file, tuple((name,) for name in needs)):
            for row in tables.read_block(block, ALL):
                if isinstance(row, str):
                    raise UserError(f"{file}, row {number}: {row}")
                yield file, number, row
                number += 1


ALL = (
    "question", "options", "choices", "answer", "image", "hint", "subject", "topic", "grade", "category", "id",
    "question_id", "video_id", "videoID", "duration", "domain", "task_type",
)  # fmt: skip


WORDS = ("question", "text", "label", "video")  # columns whose values are texts; an image may be one


def _columns(file: Path, number: int, row: dict[str, Any], *names: str) -> list[Any]:
    for name in names:
        if row.get(name) is None:
            near = nearest(name, row)
            raise UserError(f"{file}, question {number}: no '{name}'{near}; it has: {', '.join(map(str, row))}")
        if name in WORDS and not isinstance(row[name], str):
            raise UserError(f"{file}, question {number}: '{name}' is {str(row[name])[:40]!r}, not a text")
    return [row[name] for name in names]


def _letter(answer: str, options: int, file: Path, number: int) -> int:
    at = LETTERS.find(str(answer).strip()[:1].upper())
    if not 0 <= at < options:
        raise UserError(f"{file}, row {number}: its answer '{answer}' is none of the letters of {options} options")
    return at


def _find(root: Path, name: str, hint: str) -> Path:
    """The file or folder `name` somewhere below `root`, below a folder like `hint` if there are several.

    What is not there is named where it would be, and told as missing later. A name that leads out is an error.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{root}: the name '{name}' leads out of the folder")
    here = _films(root)
    found = [path for path in here.get(Path(name).stem, []) if path.as_posix().endswith("/" + name)]
    # A video may be in another container than the annotations say (MVBench is also published all in MP4).
    found = found or [
        p for p in here.get(Path(name).stem, []) if p.with_suffix("").as_posix().endswith("/" + _bare(name))
    ]
    near = [path for path in found if hint and hint in path.as_posix()]
    return (near or found or [root / hint / name])[0]


def _bare(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


@functools.lru_cache(maxsize=4)
def _films(root: Path) -> dict[str, list[Path]]:
    """Videos, pictures and folders of pictures below `root`, by their names without endings."""
    found: dict[str, list[Path]] = {}
    folders = set()
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in FILMS:
            found.setdefault(path.stem, []).append(path)
            if path.suffix.lower() in FILMS[-3:]:
                folders.add(path.parent)
    for folder in sorted(folders):
        found.setdefault(folder.name, []).append(folder)
    return found


def _nothing(where: Path, wanted: str) -> UserError:
    if not where.exists():
        near = nearest(where.name, (p.name for p in where.parent.iterdir())) if where.parent.is_dir() else ""
        return UserError(f"no such file or folder: {where}{near}")
    return UserError(f"{where} holds no {wanted}: give the folder that does")
