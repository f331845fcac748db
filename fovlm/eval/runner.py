"""`fovlm eval`: a model, some sets, some controls, all modes -> results on disk.

Items come in chunks. A chunk's frames are decoded while the one before is scored, encoded at once and only once, and
serve every mode, every control and every option. A chunk is what it is by its number alone, so a run that was killed,
or shared among ranks, gives the same lines.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from fovlm.data.chat import ChatTokenizer
from fovlm.errors import UserError, did_you_mean
from fovlm.eval import controls as ways
from fovlm.eval.eval_sets import UNCUT, EvalSet, Form, Item, open_eval_set
from fovlm.eval.likelihood import Encoding, View, encode, score, visual
from fovlm.eval.metrics import compute_metrics, line_of
from fovlm.eval.results import Line, Record, agree
from fovlm.eval.target import Target
from fovlm.fileio import write_atomically
from fovlm.model.modes import MODES

ENCODED = 32  # frames that are walked through the encoder at once
NEAR = 64  # items among which another clip is looked for
Result = dict[str, Any]
Records = dict[tuple[str, str], Record]  # by control and mode


@dataclass
class Asked:
    """What `fovlm eval` is asked to do."""

    sets: list[str]
    modes: list[str] = field(default_factory=list)  # of MODES; none: all that the model has
    controls: list[str] = field(default_factory=list)
    data: Path = Path("data")
    out: Path = Path("eval")
    limit: int | None = None
    batch: int = 4  # items whose frames are encoded together
    most: int = 64  # frames of a video
    letters: bool = False
    skip_missing: bool = False
    part: tuple[int, int] = (0, 1)  # this rank, of how many


def run_eval(
    subject: Target, asked: Asked, say: Callable[[str], None] = print, bar: Progress | None = None
) -> list[Result]:
    """Score all sets; returns their results in order once the lines of all ranks are there, and none before that.

    Raises UserError.
    """
    modes, form = modes_of(subject, asked.modes), form_of(subject, asked)
    ways.check(asked.controls)
    if form.most < asked.most:
        per_look = f" at {form.per_look} tokens each" if form.per_look > 1 else ""
        say(f"a clip shows at most {form.most} frames{per_look}: half of the model's context of {form.context}")
    exams = [
        open_eval_set(spec, asked.data, form, subject.own, asked.limit, asked.skip_missing, say) for spec in asked.sets
    ]  # all of them first: what is missing is told before anything is computed
    every = [examine_one(subject, exam, form, asked, modes, bar) for exam in exams]
    # Only now: another rank may have ended its share of the first set while this one was at the last.
    merged = [merge(exam, *one) for exam, one in zip(exams, every, strict=True)]
    found = [result for results in merged for result in results]
    return found if len(found) == sum(len(records) for _, records in every) else []


def modes_of(subject: Target, wanted: list[str]) -> list[str]:
    """The modes to score. Raises UserError for one that the model does not have."""
    there = MODES[subject.model.config.visual]
    for mode in wanted:
        if mode not in there:
            visual = subject.model.config.visual
            raise UserError(f"no mode '{mode}'{did_you_mean(mode, there)}: a {visual} model has {', '.join(there)}")
    return wanted or list(there)


def form_of(subject: Target, asked: Asked) -> Form:
    """How this model is asked."""
    config = subject.model.config
    context, per_look = config.context, config.tokens_per_look
    chat = ChatTokenizer(subject.tokenizer, config.question, "answer", UNCUT)
    most = max(min(asked.most, context // 2 // per_look), 1)  # frames leave half of the context to the text
    return Form(chat, config.frame_size, config.image_frames, context, per_look, most, asked.letters)


def examine_one(
    subject: Target, exam: EvalSet, form: Form, asked: Asked, modes: list[str], bar: Progress | None = None
) -> tuple[Result, Records]:
    """Score this rank's share of one set under every control in every mode; returns what is said of all, and where."""
    records: Records = {}
    reads = subject.model.config
    facts = {
        "set": exam.name,
        "set_hash": exam.hash,
        "questions": len(exam),
        "protocol": exam.protocol,
        "model": subject.name,
        "weights": subject.weights,
        **{
            name: getattr(reads, name)
            for name in ("question", "query_rounds", "image_frames", "frame_size", "visual_scale")
        },
        "most_frames": form.most,
        "batch": asked.batch,
        "precision": str(subject.model.dtype).removeprefix("torch."),
    }
    for control in ("", *asked.controls):
        folder = asked.out / exam.name / control
        for mode in modes:
            if ways.applies(control, subject.model.config.visual, mode):
                agree(folder, facts | {"control": control})
                records[control, mode] = Record(folder, mode, len(exam), asked.part)
    chunks = chunks_of(len(exam), asked.batch)[asked.part[0] :: asked.part[1]]
    left = [chunk for chunk in chunks if any(n not in record.done for record in records.values() for n in chunk)]
    total = sum(map(len, chunks))
    task = bar.add_task(exam.name, total=total, completed=total - sum(map(len, left))) if bar else None
    for items in _ahead(exam, left):
        score_chunk(subject, exam, items, records)
        if bar and task is not None:
            bar.advance(task, len(items))
    return facts, records


def merge(exam: EvalSet, facts: Result, records: Records) -> list[Result]:
    """The results of those ways in which all of a set is scored, also written. `set_hash` names what was scored."""
    found = []
    for (control, mode), record in records.items():
        if (lines := record.merge()) is not None:
            counted = compute_metrics(lines)
            missing = exam.left_out | counted.pop("left_out")
            result = facts | {"control": control, "mode": mode, "left_out": missing} | counted
            if without := {line["n"] for line in lines if "left_out" in line}:
                result["set_hash"] = exam.hash_without(without)
            write_atomically(record.folder / f"{mode}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            found.append(result)
    return found


def chunks_of(items: int, batch: int) -> list[range]:
    """The numbers of the items that go together; one that would be left alone goes with those before it."""
    starts = list(range(0, items, batch))
    if len(starts) > 1 and items - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], items], strict=True)]


def _ahead(exam: EvalSet, chunks: list[range]) -> Iterator[list[tuple[int, Item | str]]]:
    """The items of each chunk with their numbers; the next ones are decoded meanwhile."""

    def load(chunk: range) -> list[tuple[int, Item | str]]:
        return [(number, exam.item(number)) for number in chunk]

    with ThreadPoolExecutor(1) as other:
        coming = other.submit(load, chunks[0]) if chunks else None
        for following in [*chunks[1:], None]:
            if coming is None:
                return
            ready = coming.result()
            coming = other.submit(load, following) if following is not None else None
            yield ready


def score_chunk(subject: Target, exam: EvalSet, items: list[tuple[int, Item | str]], records: Records) -> None:
    """Encode the frames of a chunk once, and add its lines to every record that lacks them."""
    whole = [item for _, item in items if isinstance(item, Item)]
    views = views_of(subject, whole)
    others: dict[int, View | None] = {}
    if any(control == "foreign" for control, _ in records):
        others = {
            item.number: _other(item, whole, views) or _elsewhere(subject, exam, item, items[-1][0]) for item in whole
        }
    blind: dict[int, Line] = {}  # without frames all modes are one
    for (control, mode), record in records.items():
        for number, item in items:
            if number in record.done:
                continue
            if isinstance(item, str):
                record.add({"n": number, "left_out": item})
            elif control == "foreign" and others[number] is None and views[number] is not None:
                record.add({"n": number, "id": item.id, "left_out": "there is no other clip near it"})
            else:
                view = ways.under(control, views[number], others.get(number), item.id)
                line = blind.get(number) if view is None else None
                line = line or _line(subject, item, view, mode)
                if view is None:
                    blind[number] = line
                record.add(line)


def views_of(subject: Target, items: list[Item]) -> dict[int, View | None]:
    """What each item shows, by its number: the frames of all of them are encoded once, ENCODED at a time."""
    model = subject.model
    views: dict[int, View | None] = {item.number: None for item in items}
    clips: dict[str, Tensor] = {item.clip: item.frames for item in items if len(item.frames)}  # each clip once
    if not clips:
        return views
    frames = torch.cat(list(clips.values())).to(model.device)
    encoding = Encoding.join([encode(model, part) for part in frames.split(ENCODED)])
    places, at = {}, 0
    for clip, shown in clips.items():
        places[clip] = encoding.of(at, at := at + len(shown))
    for item in items:
        if len(item.frames):
            first = item.texts[0]
            asked = first.tokens[: first.prompt].to(model.device)
            views[item.number] = View(places[item.clip], item.looks.to(model.device), asked)
    return views


def _other(item: Item, items: list[Item], views: dict[int, View | None]) -> View | None:
    """The view of the next item in the chunk, round and round, that shows another clip."""
    at = items.index(item)
    around = [*items[at + 1 :], *items[:at]]
    return next((views[other.number] for other in around if len(other.frames) and other.clip != item.clip), None)


def _elsewhere(subject: Target, exam: EvalSet, item: Item, behind: int) -> View | None:
    """The same from behind the chunk, for an item whose chunk shows nothing else; costs one more encoding."""
    if not len(item.frames):
        return None
    for step in range(1, min(len(exam), NEAR) + 1):
        other = exam.item((behind + step) % len(exam))
        if isinstance(other, Item) and len(other.frames) and other.clip != item.clip:
            return views_of(subject, [other])[other.number]
    return None


def _line(subject: Target, item: Item, view: View | None, mode: str) -> Line:
    nll = score(subject.model, visual(subject.model, view, mode), item.texts)
    sums = [float(one.double().sum()) for one in nll]
    told = {"n": item.number, "id": item.id, "source": item.source, "modality": item.modality}
    told |= {"category": item.category, "extra": item.extra} if item.answer is not None else {}
    return told | line_of(sums, [int((text.weight > 0).sum()) for text in item.texts], item.answer)
