"""`fovlm eval`: score a model on sets, in all modes and under controls, and write the results.

Items come in chunks. While one chunk is scored, the next one is decoded. A chunk's frames are encoded once for every
mode, control and option. Chunks depend on item numbers alone, so interrupted runs and runs on several ranks give the
same results.
"""

import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fovlm.data.chat import ChatTokenizer
from fovlm.eval.controls import applies, apply_control, is_foreign
from fovlm.eval.controls import check as check_controls
from fovlm.eval.eval_sets import UNCUT, EvalItem, EvalSet, InputFormat, open_eval_set
from fovlm.eval.likelihood import View, encode, score, visual_tokens
from fovlm.eval.metrics import compute_metrics, score_options
from fovlm.eval.results import ResultFile, SampleResult, check_or_write
from fovlm.eval.target import Target
from fovlm.fileio import write_atomically
from fovlm.model.modes import MODES, mode_of
from fovlm.progress import track

NEAR = 64  # items among which another clip and question are looked for
Result = dict[str, Any]
Files = dict[tuple[str, str], ResultFile]  # by control and mode
Chunk = list[tuple[int, EvalItem | str]]  # numbers of items, with the item or the reason why it is skipped
Asked = tuple[str, Tensor] | None  # an item's clip and question; None without frames


@dataclass
class EvalSettings:
    """The options of `fovlm eval`."""

    sets: list[str]
    modes: list[str] = field(default_factory=list)  # of MODES; by default all of the model
    controls: list[str] = field(default_factory=list)
    data: Path = Path("data")
    out: Path = Path("eval")
    limit: int | None = None
    batch: int = 4  # items whose frames are encoded together
    max_frames: int = 64  # of a video
    letters: bool = False
    skip_missing: bool = False
    part: tuple[int, int] = (0, 1)  # (rank, number of ranks)


def run_eval(target: Target, settings: EvalSettings, log: Callable[[str], None] = print) -> list[Result]:
    """Score all sets; the results in order on the rank that finishes last, an empty list on others. Raises
    UserError."""
    visual, form = target.model.config.visual, format_of(target, settings)
    modes = [mode_of(mode, visual) for mode in settings.modes] or list(MODES[visual])
    check_controls(settings.controls)
    if form.max_frames < settings.max_frames:
        each = f" at {form.tokens_per_look} tokens each" if form.tokens_per_look > 1 else ""
        log(f"a clip has at most {form.max_frames} frames{each}: half of the model's context of {form.context}")
    options = (settings.limit, settings.skip_missing, log)
    # All sets are opened first: missing files end the command before anything is computed.
    sets = [open_eval_set(spec, settings.data, form, target.val_sources, *options) for spec in settings.sets]
    scored = [score_set(target, one, form, settings, modes) for one in sets]
    # Merged last: another rank may have completed the first set while this one was at the last.
    merged = [merge(one, *found) for one, found in zip(sets, scored, strict=True)]
    results = [result for part in merged for result in part]
    return results if len(results) == sum(len(files) for _, files in scored) else []


def format_of(target: Target, settings: EvalSettings) -> InputFormat:
    """How this model is asked."""
    config = target.model.config
    context, T = config.context, config.tokens_per_look
    chat = ChatTokenizer(target.tokenizer, config.question, "answer", UNCUT)
    max_frames = max(min(settings.max_frames, context // 2 // T), 1)  # half of the context is for the text
    return InputFormat(chat, config.frame_size, config.image_frames, context, T, max_frames, settings.letters)


def score_set(
    target: Target, eval_set: EvalSet, form: InputFormat, settings: EvalSettings, modes: list[str]
) -> tuple[Result, Files]:
    """Score this rank's part of a set in all modes and under all controls -> (what results share, their files)."""
    files: Files = {}
    config = target.model.config
    names = ("question", "query_rounds", "image_frames", "frame_size", "visual_scale")
    facts = {
        "set": eval_set.name,
        "set_hash": eval_set.hash,
        "items": len(eval_set),
        "protocol": eval_set.protocol,
        "model": target.name,
        "weights": target.weights,
        **{name: getattr(config, name) for name in names},
        "max_frames": form.max_frames,
        "batch": settings.batch,
        "precision": str(target.model.dtype).removeprefix("torch."),
    }
    for control in ("", *settings.controls):
        folder = settings.out / eval_set.name / control
        for mode in modes:
            if applies(control, config.visual, mode):
                check_or_write(folder, facts | {"control": control})
                files[control, mode] = ResultFile(folder, mode, len(eval_set), settings.part)
    rank, ranks = settings.part
    mine = chunks_of(len(eval_set), settings.batch)[rank::ranks]
    left = [chunk for chunk in mine if any(n not in file.done for file in files.values() for n in chunk)]
    chunks = _prefetch(eval_set, left)
    asked = functools.cache(lambda number: asked_of(eval_set.item(number)))
    for chunk in track(chunks, f"batches of {eval_set.name}", len(left)) if rank == 0 else chunks:
        score_chunk(target, eval_set, chunk, files, asked)
    return facts, files


def merge(eval_set: EvalSet, facts: Result, files: Files) -> list[Result]:
    """Write and return the results of each mode and control that is complete. `set_hash` identifies what was scored."""
    found = []
    for (control, mode), file in files.items():
        if (samples := file.merge()) is not None:
            metrics = compute_metrics(samples)
            skipped = eval_set.skipped | metrics.pop("skipped")
            result = facts | {"control": control, "mode": mode, "skipped": skipped} | metrics
            if without := {sample["n"] for sample in samples if "skipped" in sample}:
                result["set_hash"] = eval_set.hash_without(without)
            write_atomically(file.folder / f"{mode}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            found.append(result)
    return found


def chunks_of(items: int, batch: int) -> list[range]:
    """The numbers of the items of each chunk; a single last item joins the chunk before it."""
    starts = list(range(0, items, batch))
    if len(starts) > 1 and items - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], items], strict=True)]


def _prefetch(eval_set: EvalSet, chunks: list[range]) -> Iterator[Chunk]:
    """The items of each chunk; the next chunk is decoded meanwhile."""

    def load(numbers: range) -> Chunk:
        return [(number, eval_set.item(number)) for number in numbers]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load, chunks[0]) if chunks else None
        for following in [*chunks[1:], None]:
            if coming is None:
                return
            ready = coming.result()
            coming = pool.submit(load, following) if following is not None else None
            yield ready


def asked_of(item: EvalItem | str) -> Asked:
    """What decides which items are foreign to it."""
    return (item.clip, item.prompt) if isinstance(item, EvalItem) and len(item.frames) else None


def score_chunk(target: Target, eval_set: EvalSet, chunk: Chunk, files: Files, asked: Callable[[int], Asked]) -> None:
    """Encode the frames of a chunk once, and add its items to every file that lacks them. `asked` remembers what items
    ask, by number: to look for a foreign one would decode the same items again for each."""
    items = [item for _, item in chunk if isinstance(item, EvalItem)]
    views = views_of(target, items)
    others: dict[int, View | None] = {}
    if any(control == "foreign" for control, _ in files):
        last = chunk[-1][0]
        others = {item.number: _other_view(target, eval_set, asked, item, items, views, last) for item in items}
    blind: dict[int, SampleResult] = {}  # without frames all modes are the same
    for (control, mode), file in files.items():
        for number, item in chunk:
            if number in file.done:
                continue
            if isinstance(item, str):
                file.add({"n": number, "skipped": item})
            elif control == "foreign" and others[number] is None and views[number] is not None:
                file.add({"n": number, "id": item.id, "skipped": "no other clip and question nearby"})
            else:
                view = apply_control(control, views[number], others.get(number), item.id)
                result = blind.get(number) if view is None else None
                result = result or _score_item(target, item, view, mode)
                if view is None:
                    blind[number] = result
                file.add(result)


def views_of(target: Target, items: list[EvalItem]) -> dict[int, View | None]:
    """The view of each item by number, None without frames; every clip is encoded once."""
    model = target.model
    views: dict[int, View | None] = {item.number: None for item in items}
    clips: dict[str, Tensor] = {item.clip: item.frames for item in items if len(item.frames)}
    if not clips:
        return views
    frames = torch.cat(list(clips.values())).to(model.device)
    encoding = encode(model, frames)
    encodings, at = {}, 0
    for clip, shown in clips.items():
        encodings[clip] = encoding.of(at, at := at + len(shown))
    for item in items:
        if len(item.frames):
            looks, prompt = item.looks.to(model.device), item.prompt.to(model.device)
            views[item.number] = View(encodings[item.clip], looks, prompt)
    return views


def _other_view(
    target: Target,
    eval_set: EvalSet,
    asked: Callable[[int], Asked],
    item: EvalItem,
    items: list[EvalItem],
    views: dict[int, View | None],
    last: int,
) -> View | None:
    """The view of the next foreign item: of its chunk, cyclically, or behind it, which costs an encoding."""
    if not len(item.frames):
        return None

    def differs(other: Asked) -> bool:
        return other is not None and is_foreign(item.clip, item.prompt, *other)

    at = items.index(item)
    if near := next((one for one in [*items[at + 1 :], *items[:at]] if differs(asked_of(one))), None):
        return views[near.number]
    behind = ((last + n) % len(eval_set) for n in range(1, min(len(eval_set), NEAR) + 1))
    found = next((number for number in behind if differs(asked(number))), None)
    other = "" if found is None else eval_set.item(found)
    return views_of(target, [other])[other.number] if isinstance(other, EvalItem) else None


def _score_item(target: Target, item: EvalItem, view: View | None, mode: str) -> SampleResult:
    nll = score(target.model, visual_tokens(target.model, view, mode), item.texts)
    sums = [float(one.double().sum()) for one in nll]
    facts = {"n": item.number, "id": item.id, "source": item.source, "modality": item.modality}
    facts |= {"category": item.category, "extra": item.extra} if item.answer is not None else {}
    return facts | score_options(sums, [int((text.weight > 0).sum()) for text in item.texts], item.answer)
