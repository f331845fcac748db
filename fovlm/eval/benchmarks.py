"""Readers of MVBench, Video-MME, ScienceQA and POPE: the published annotation files -> questions.

A reader gets the downloaded folder (or one annotation file) and yields all questions in order; missing videos and
pictures are found later, all at once. The published formats:

    MVBench    json/TASK.json: [{"video", "question", "candidates", "answer" (a text), "start"?, "end"?}], video/...
    Video-MME  videomme/test-*.parquet: question_id, videoID, duration, domain, task_type, question,
               options ["A. ..", ..], answer "C"; the videos are videoID.mp4
    ScienceQA  *.parquet: image {bytes} or null, question, choices, answer (a number), hint, subject, topic ..
    POPE       coco_pope_{random,popular,adversarial}.json, JSON lines: question_id, image (a file), text, label;
               or the parquet edition: id, question, answer, image, category
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fovlm.data import tables
from fovlm.errors import UserError, did_you_mean, did_you_mean_path
from fovlm.eval.questions import LETTERS, EvalQuestion, without_letters

IMAGES = (".jpg", ".jpeg", ".png")
MEDIA = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif", ".flv", *IMAGES)
POPE_FILE = re.compile(r"(?:(.+)_)?pope_(?:seem_)?(random|popular|adversarial)")  # coco_, aokvqa_ or gqa_
# The folder of each MVBench task: several of its sources use the same file names.
MVBENCH_FOLDERS = {
    "action_sequence": "star/Charades", "action_prediction": "star/Charades", "object_interaction": "star/Charades",
    "action_antonym": "ssv2_video", "fine_grained_action": "Moments_in_Time_Raw", "unexpected_action": "FunQA_test",
    "object_existence": "clevrer", "moving_direction": "clevrer", "moving_count": "clevrer",
    "moving_attribute": "clevrer", "counterfactual_inference": "clevrer", "object_shuffle": "perception",
    "action_count": "perception", "state_change": "perception", "character_order": "perception",
    "action_localization": "sta/sta_video", "scene_transition": "scene_qa", "fine_grained_pose": "nturgbd",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa",
}  # fmt: skip
COLUMNS = (
    "question", "options", "choices", "answer", "image", "hint", "subject", "topic", "grade", "category", "id",
    "question_id", "video_id", "videoID", "duration", "domain", "sub_category", "task_type",
)  # fmt: skip
TEXTS = ("question", "text", "label", "video")  # columns that must hold a string


def mvbench(where: Path) -> Iterator[EvalQuestion]:
    """Every task of MVBench, or the task of one JSON file. Raises UserError."""
    files = [where] if where.is_file() else sorted((where / "json").glob("*.json")) or sorted(where.glob("*.json"))
    if not files:
        raise _nothing(where, "json/TASK.json (a list of questions for each task)")
    root = where.parent.parent if where.is_file() and where.parent.name == "json" else where
    root = root.parent if root.is_file() else root
    for file in files:
        for number, row in enumerate(tables.read_json_list(file)):
            name, text, options, answer = _columns(file, number, row, "video", "question", "candidates", "answer")
            if answer not in options:
                raise UserError(f"{file}, question {number}: its answer '{answer}' is not one of its candidates")
            video = _find(root, name, MVBENCH_FOLDERS.get(file.stem, ""))
            # The edition cut into segments still gives the times within the original videos.
            cut = any(folder.endswith("_segment") for folder in video.relative_to(root).parts[:-1])
            timed = row.get("end") is not None and not cut
            yield EvalQuestion(
                id=f"{file.stem}/{number}",
                category=file.stem,
                media=(video,),
                question=text.strip(),
                options=tuple(map(str, options)),
                answer=options.index(answer),
                segment=(float(row.get("start") or 0), float(row["end"])) if timed else None,
            )


def videomme(where: Path) -> Iterator[EvalQuestion]:
    """Video-MME without its subtitles. Raises UserError."""
    root = where.parent if where.is_file() else where
    for file, number, row in _parquet(where, ("question", "options", "answer")):
        text, options, answer = _columns(file, number, row, "question", "options", "answer")
        right = LETTERS.find(str(answer).strip()[:1].upper())
        if not 0 <= right < len(options):
            raise UserError(f"{file}, row {number}: its answer '{answer}' is no letter of its {len(options)} options")
        yield EvalQuestion(
            id=str(row.get("question_id") or number),
            category=str(row.get("task_type") or "all"),
            media=(_find(root, f"{row.get('videoID') or row.get('video_id')}.mp4", ""),),
            question=text.strip(),
            options=without_letters(options),
            answer=right,
            extra={k: str(row[k]) for k in ("duration", "domain", "sub_category") if row.get(k)},
        )


def scienceqa(where: Path) -> Iterator[EvalQuestion]:
    """ScienceQA with its hints before the questions; only the test split if file names say which it is. Raises
    UserError."""
    for file, number, row in _parquet(where, ("question", "choices", "answer")):
        text, options, answer = _columns(file, number, row, "question", "choices", "answer")
        data = _image_bytes(row.get("image"))
        hint = str(row.get("hint") or "").strip()
        if not isinstance(answer, int) or not 0 <= answer < len(options):
            raise UserError(
                f"{file}, row {number}: its answer {answer!r} is not a number of its {len(options)} choices"
            )
        shows = {"shows": "a picture" if data else "text only"}
        yield EvalQuestion(
            id=f"{file.stem}/{number}",
            category=str(row.get("subject") or "all"),
            media=(data,) if data else (),
            question=f"{hint}\n{text.strip()}" if hint else text.strip(),
            options=tuple(map(str, options)),
            answer=answer,
            extra={k: str(row[k]) for k in ("topic", "grade") if row.get(k)} | shows,
        )


def pope(where: Path) -> Iterator[EvalQuestion]:
    """POPE's yes-or-no questions of all three kinds. Raises UserError.

    POPE has editions over pictures of COCO, A-OKVQA and GQA; the one of COCO is read if it is there. Pictures are
    searched below `where`, and beside it when it is the folder of the annotations.
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
            image = next((place for place in places if place.exists()), roots[0] / name)
            yield _yes_or_no(f"{category}/{row.get('question_id', number)}", category, image, text, label, file, number)


def _pope_files(where: Path) -> tuple[str, list[Path]]:
    """(edition, its annotation files); no files for the parquet edition. Raises UserError."""
    editions: dict[str, list[Path]] = {}
    for file in [where] if where.is_file() else sorted(where.rglob("*pope*.json*")):
        named = POPE_FILE.fullmatch(file.stem)
        if file.suffix in (".json", ".jsonl") and (named or file == where):
            editions.setdefault((named and named.group(1)) or "coco", []).append(file)
    if editions and "coco" not in editions and len(editions) > 1:
        names = " and ".join(editions)
        raise UserError(f"{where} holds POPE over the pictures of {names}, separate benchmarks: give the folder of one")
    edition = "coco" if "coco" in editions else next(iter(editions), "")
    if not editions and where.is_dir() and not any(where.rglob("*.parquet")):
        raise _nothing(where, "coco_pope_*.json and no parquet edition of it")
    return edition, editions.get(edition, [])


def _pope_parquet(where: Path) -> Iterator[EvalQuestion]:
    for file, number, row in _parquet(where, ("question", "answer", "image")):
        text, label, image = _columns(file, number, row, "question", "answer", "image")
        category = str(row.get("category") or "all")
        key = f"{category}/{row.get('id', number)}"
        yield _yes_or_no(key, category, _image_bytes(image), text, label, file, number)


def _yes_or_no(key: str, category: str, image: Path | bytes, text: str, label: str, file: Path, n: int) -> EvalQuestion:
    options = ("yes", "no")
    if (answer := label.strip().lower()) not in options:
        raise UserError(f"{file}, question {n}: its label is yes or no, not '{label}'")
    return EvalQuestion(key, category, (image,), text.strip(), options, options.index(answer))


def _image_bytes(image: Any) -> bytes:
    return bytes((image.get("bytes") if isinstance(image, dict) else image) or b"")


READERS: dict[str, Callable[[Path], Iterator[EvalQuestion]]] = {
    "mvbench": mvbench, "videomme": videomme, "scienceqa": scienceqa, "pope": pope,
}  # fmt: skip


def read_questions(name: str, where: Path) -> list[EvalQuestion]:
    """All questions of the benchmark `name`, in order. Raises UserError, also when a question is there twice."""
    questions, ids = list(READERS[name](where)), set()
    for question in questions:
        if question.id in ids:
            raise UserError(
                f"{name}: {where} holds question {question.id} twice, probably from two downloads: give the folder or "
                "file of one"
            )
        ids.add(question.id)
    return questions


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one JSON object a line. Raises UserError with the number of the line, from 1."""
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}, line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number} is not a JSON object with one question")
            yield row


def _parquet(where: Path, needs: tuple[str, ...]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, row number, row) of the tables with "test" in their name, or of all if none has. Raises UserError."""
    files = tables.find_tables(where, ("parquet",))
    files = [f for f in files if "test" in f.stem.lower()] or files
    if len(folders := list(dict.fromkeys(file.parent for file in files))) > 1:
        raise UserError(
            f"{where} has tables in {folders[0]} and in {folders[1]}, maybe the same questions: give one of them"
        )
    for file in files:
        blocks = tables.blocks_of(file, tuple((name,) for name in needs))
        for number, row in enumerate(row for block in blocks for row in tables.read_block(block, COLUMNS)):
            if isinstance(row, str):
                raise UserError(f"{file}, row {number}: {row}")
            yield file, number, row


def _columns(file: Path, number: int, row: dict[str, Any], *names: str) -> list[Any]:
    for name in names:
        if row.get(name) is None:
            near = did_you_mean(name, row)
            raise UserError(f"{file}, question {number}: no '{name}'{near}; it has: {', '.join(map(str, row))}")
        if name in TEXTS and not isinstance(row[name], str):
            raise UserError(f"{file}, question {number}: '{name}' is {str(row[name])[:40]!r}, not a text")
    return [row[name] for name in names]


def _find(root: Path, name: str, hint: str) -> Path:
    """The file or folder `name` anywhere below `root`; if there are several, one with `hint` in its path.

    Returns the expected place if there is none. Raises UserError for a name that leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{root}: the name '{name}' leads out of the folder")
    same_stem = _list_media(root).get(Path(name).stem, [])
    found = [path for path in same_stem if path.as_posix().endswith("/" + name)]
    if not found:  # with another container than the annotations say: MVBench is also published all in MP4
        bare = "/" + Path(name).with_suffix("").as_posix()
        found = [path for path in same_stem if path.with_suffix("").as_posix().endswith(bare)]
    hinted = [path for path in found if hint and hint in path.as_posix()]
    return (hinted or found or [root / hint / name])[0]


@functools.lru_cache(maxsize=4)
def _list_media(root: Path) -> dict[str, list[Path]]:
    """Videos, pictures and folders of pictures below `root` by their stems."""
    found: dict[str, list[Path]] = {}
    folders = set()
    for path in sorted(_files(root)):
        if path.suffix.lower() in MEDIA:
            found.setdefault(path.stem, []).append(path)
            if path.suffix.lower() in IMAGES:
                folders.add(path.parent)
    for folder in sorted(folders):
        found.setdefault(folder.name, []).append(folder)
    return found


def _files(root: Path) -> Iterator[Path]:
    """All files below a folder, also behind links (COCO's pictures are often linked), each real folder once."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        yield from (Path(folder, name) for name in names)


def _nothing(where: Path, wanted: str) -> UserError:
    if where.exists():
        return UserError(f"{where} holds no {wanted}: give the folder that does")
    return UserError(f"no such file or folder: {where}{did_you_mean_path(where)}")
