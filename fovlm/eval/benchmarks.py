"""The published annotation files of MVBench, Video-MME, ScienceQA and POPE -> questions.

A reader takes the folder as it was downloaded (or one annotation file) and yields every question in order; videos and
pictures that are not there are found missing later, all at once. Formats as their authors publish them:

    MVBench    json/TASK.json: [{"video", "question", "candidates", "answer" (a text), "start"?, "end"?}], video/...
    Video-MME  videomme/test-*.parquet: question_id, videoID, duration, domain, task_type, question,
               options ["A. ..", ..], answer "C"; the videos are videoID.mp4
    ScienceQA  *.parquet: image {bytes} or null, question, choices, answer (a number), hint, subject, topic ..
    POPE       coco_pope_{random,popular,adversarial}.json, JSON lines: question_id, image (a file), text, label;
               or the parquet edition: id, question, answer, image, category

`questions_of` is how they are called: it refuses a folder that holds the same questions twice.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fovlm.data import tables
from fovlm.errors import UserError, did_you_mean
from fovlm.eval.questions import LETTERS, EvalQuestion, unmarked

FILMS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif", ".flv", ".jpg", ".jpeg", ".png")
POPE_FILE = re.compile(r"(?:(.+)_)?pope_(?:seem_)?(random|popular|adversarial)")  # coco_, aokvqa_ or gqa_
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


def mvbench(where: Path) -> Iterator[EvalQuestion]:
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
            film = _find(root, name, MVBENCH_FOLDERS.get(file.stem, ""))
            # Pieces are published too, beside rows that still say where in the whole film they were.
            cut = any(folder.endswith("_segment") for folder in film.relative_to(root).parts[:-1])
            timed = row.get("end") is not None and not cut
            yield EvalQuestion(
                id=f"{file.stem}/{number}",
                category=file.stem,
                media=(film,),
                question=text.strip(),
                options=tuple(map(str, options)),
                answer=options.index(answer),
                part=(float(row.get("start") or 0), float(row["end"])) if timed else None,
            )


def videomme(where: Path) -> Iterator[EvalQuestion]:
    """Video-MME without its subtitles. Raises UserError."""
    root = where.parent if where.is_file() else where
    for file, number, row in _parquet(where, ("question", "options", "answer")):
        text, options, answer = _columns(file, number, row, "question", "options", "answer")
        name = str(row.get("videoID") or row.get("video_id"))
        yield EvalQuestion(
            id=str(row.get("question_id") or number),
            category=str(row.get("task_type") or "all"),
            media=(_find(root, f"{name}.mp4", ""),),
            question=text.strip(),
            options=unmarked(options),
            answer=_letter(answer, len(options), file, number),
            extra={k: str(row[k]) for k in ("duration", "domain", "sub_category") if row.get(k)},
        )


def scienceqa(where: Path) -> Iterator[EvalQuestion]:
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
        yield EvalQuestion(
            id=f"{file.stem}/{number}",
            category=str(row.get("subject") or "all"),
            media=(bytes(data),) if data else (),
            question=f"{hint}\n{text.strip()}" if hint else text.strip(),
            options=tuple(map(str, options)),
            answer=answer,
            extra={k: str(row[k]) for k in ("topic", "grade") if row.get(k)}
            | {"shows": "a picture" if data else "text only"},
        )


def pope(where: Path) -> Iterator[EvalQuestion]:
    """POPE's yes and no questions, of all three kinds. Raises UserError.

    It is published over pictures of COCO and, as benchmarks of their own, of A-OKVQA and GQA: where COCO's is there it
    is that. Pictures are looked for from `where` on; when that is the folder of the annotations, beside it as well.
    """
    edition, files = _pope_files(where)
    if not files:
        yield from _pope_parquet(where)
        return
    roots = [where.parent if where.is_file() else where]
    above = roots[0].resolve().parent
    if (where.is_file() or where.name == edition) and above != above.parent:
        roots.append(above)
    for file in files:
        named = POPE_FILE.fullmatch(file.stem)
        category = named.group(2) if named else file.stem
        for number, row in enumerate(_json_lines(file)):
            name, text, label = _columns(file, number, row, "image", "text", "label")
            places = (_find(root, name, "") for root in roots)
            shown = next((place for place in places if place.exists()), roots[0] / name)
            yield _yes_or_no(f"{category}/{row.get('question_id', number)}", category, shown, text, label, file, number)


def _pope_files(where: Path) -> tuple[str, list[Path]]:
    """Which edition, and its annotation files; none where there are only tables. Raises UserError."""
    editions: dict[str, list[Path]] = {}
    every = [where] if where.is_file() else sorted(where.rglob("*pope*.json*"))
    for file in every:
        named = POPE_FILE.fullmatch(file.stem)
        if file.suffix in (".json", ".jsonl") and (named or file == where):
            editions.setdefault((named and named.group(1)) or "coco", []).append(file)
    if editions and "coco" not in editions and len(editions) > 1:
        told = f"{where} holds POPE over the pictures of {' and of '.join(editions)}, which are benchmarks apart"
        raise UserError(f"{told}: give the folder of one")
    edition = "coco" if "coco" in editions else next(iter(editions), "")
    if not editions and where.is_dir() and not any(where.rglob("*.parquet")):
        raise _nothing(where, "coco_pope_*.json and no parquet edition of it")
    return edition, editions.get(edition, [])


def _pope_parquet(where: Path) -> Iterator[EvalQuestion]:
    for file, number, row in _parquet(where, ("question", "answer", "image")):
        text, label, image = _columns(file, number, row, "question", "answer", "image")
        category = str(row.get("category") or "all")
        data = bytes(image["bytes"] if isinstance(image, dict) else image)
        yield _yes_or_no(f"{category}/{row.get('id', number)}", category, data, text, label, file, number)


def _yes_or_no(key: str, category: str, shown: Path | bytes, text: str, label: str, file: Path, n: int) -> EvalQuestion:
    if (said := label.strip().lower()) not in ("yes", "no"):
        raise UserError(f"{file}, question {n}: its label is yes or no, not '{label}'")
    return EvalQuestion(key, category, (shown,), text.strip(), ("yes", "no"), ("yes", "no").index(said))


READERS: dict[str, Callable[[Path], Iterator[EvalQuestion]]] = {
    "mvbench": mvbench, "videomme": videomme, "scienceqa": scienceqa, "pope": pope,
}  # fmt: skip


def questions_of(name: str, where: Path) -> list[EvalQuestion]:
    """Every question of the benchmark `name`, in order. Raises UserError, also when one is there twice."""
    questions, ids = list(READERS[name](where)), set()
    for question in questions:
        if question.id in ids:
            told = f"{name}: {where} holds question {question.id} twice"
            raise UserError(f"{told}, as if it held two downloads of the same: give the folder or file of one")
        ids.add(question.id)
    return questions


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
    if len(folders := list(dict.fromkeys(file.parent for file in files))) > 1:
        told = f"{where} has tables in {folders[0]} and in {folders[1]}, which may hold the same questions"
        raise UserError(f"{told}: give one of them")
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
    "question_id", "video_id", "videoID", "duration", "domain", "sub_category", "task_type",
)  # fmt: skip


WORDS = ("question", "text", "label", "video")  # columns whose values are texts; an image may be one


def _columns(file: Path, number: int, row: dict[str, Any], *names: str) -> list[Any]:
    for name in names:
        if row.get(name) is None:
            near = did_you_mean(name, row)
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
    for path in sorted(_files(root)):
        if path.suffix.lower() in FILMS:
            found.setdefault(path.stem, []).append(path)
            if path.suffix.lower() in FILMS[-3:]:
                folders.add(path.parent)
    for folder in sorted(folders):
        found.setdefault(folder.name, []).append(folder)
    return found


def _files(root: Path) -> Iterator[Path]:
    """All files below a folder, also behind links (pictures of COCO are often linked), each real folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in names)


def _nothing(where: Path, wanted: str) -> UserError:
    if not where.exists():
        near = did_you_mean(where.name, (p.name for p in where.parent.iterdir())) if where.parent.is_dir() else ""
        return UserError(f"no such file or folder: {where}{near}")
    return UserError(f"{where} holds no {wanted}: give the folder that does")
