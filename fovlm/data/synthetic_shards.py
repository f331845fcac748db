"""The embedded task as a data set, and how well a model does at it: `hunt.py` draws, this file writes and judges.

make(task)             shards, tokenizer and the places of the asked objects, below FOVLM_DATA; once
judge(...)             what the task can tell about a model: beside its loss, where it looked
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fovlm import distributed
from fovlm.config.schema import SyntheticTask
from fovlm.data.chat import SYSTEM
from fovlm.data.packing import Batch
from fovlm.data.shards import write_shards
from fovlm.data.synthetic import COLOURS, QUESTION, SHAPES, Clips, generate, names
from fovlm.errors import UserError
from fovlm.fileio import locked, remove_unfinished, staged_dir
from fovlm.media.encode import encode_jpeg
from fovlm.model.modeling import FoveatedVLM
from fovlm.paths import data_root
from fovlm.viz.heatmap import maps

PER_SHARD = 1000
TRUTH = "truth.json"  # where the asked object is in every frame of every validation clip
COUNT = "count {many} from {first}"  # the text-only task
NUMBERS = {3: "three", 4: "four", 5: "five"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def folder(task: SyntheticTask) -> Path:
    """Where the task's files are."""
    return data_root() / task.folder


def make(task: SyntheticTask) -> None:
    """Write the shards video, image, text and val, the tokenizer and the truth, unless the same are there already.

    Of two runs that start at once, one writes and the other waits.
    """
    target, settings = folder(task), task.model_dump_json(indent=1)
    if _is_made(target, settings):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(target.name + ".lock")):
        if not _is_made(target, settings):
            _make(task, target, settings)


def _is_made(target: Path, settings: str) -> bool:
    return (target / "task.json").exists() and (target / "task.json").read_text() == settings


def _make(task: SyntheticTask, target: Path, settings: str) -> None:
    if target.exists() and not (target / "task.json").exists():
        raise UserError(f"data.generate.folder: {target} holds other things: name another folder")
    remove_unfinished(target)
    with staged_dir(target) as staging:
        _write(task, staging)
        (staging / "task.json").write_text(settings)
        shutil.rmtree(target, ignore_errors=True)


def _write(task: SyntheticTask, folder: Path) -> None:
    clips = task.train_clips
    others = 1 - task.text_fraction - task.image_fraction
    pictures, texts = (round(clips * share / max(others, 0.1)) for share in (task.image_fraction, task.text_fraction))
    write_shards(folder / "video-%03d.tar", _videos(task, "clip", clips, task.frames, task.objects, 1), PER_SHARD)
    write_shards(folder / "image-%03d.tar", _videos(task, "image", pictures, 1, task.objects, 2), max(pictures, 1))
    write_shards(folder / "text-%03d.tar", _texts(task, texts), max(texts, 1))
    truth: dict[str, list[int]] = {}
    crowd = [max(task.objects)]  # validation has the hardest clips only
    write_shards(folder / "val-%03d.tar", _videos(task, "val", task.val_clips, task.frames, crowd, 3, truth), 10**6)
    pictured = _videos(task, "val_image", task.val_clips, 1, crowd, 5, truth)
    write_shards(folder / "val_image-%03d.tar", pictured, 10**6)
    tokenizer(task).save_pretrained(folder / "tokenizer")
    (folder / TRUTH).write_text(json.dumps(truth))


def tokenizer(task: SyntheticTask) -> PreTrainedTokenizerFast:
    """A word-level ChatML tokenizer that knows the words of the task and no others."""
    words = ["system", "user", "assistant", *SYSTEM.split(), *QUESTION.split(), *COLOURS, *SHAPES, *map(str, range(10))]
    words += [*COUNT.split(), *NUMBERS.values()]
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def _videos(
    task: SyntheticTask, kind: str, count: int, frames: int, objects: list[int], stream: int, truth: dict | None = None
) -> Iterator[dict[str, Any]]:
    """Samples with `frames` numbered JPEGs, or one picture; `truth` gets the cells of the asked object."""
    called = names(task.names)
    rng = np.random.default_rng([task.seed, stream])
    for start in range(0, count, PER_SHARD):  # in parts: a thousand clips at a time in memory
        part: Clips = generate(
            rng, min(PER_SHARD, count - start), objects, frames, task.grid, task.patch, task.names, task.marks
        )
        for i in range(len(part.frames)):
            key = f"{kind}{start + i:06d}"
            record = {
                "user": QUESTION.format(name=called[part.asked[i]]),
                "assistant": " ".join(map(str, part.marks[i])),
                "source": f"hunt/{kind}",
            }
            pictures = [encode_jpeg(frame) for frame in part.frames[i]]
            one = kind.endswith("image")
            named = {"jpg": pictures[0]} if one else {f"{n:03d}.jpg": p for n, p in enumerate(pictures)}
            if truth is not None:
                truth[key] = part.cell[i].tolist()
            yield {"__key__": key, "json": record, **named}


def _texts(task: SyntheticTask, count: int) -> Iterator[dict[str, Any]]:
    """Text alone: counting on from a number, round and round."""
    rng = np.random.default_rng([task.seed, 4])
    for i in range(count):
        many, first = int(rng.integers(3, 6)), int(rng.integers(task.marks))
        answer = " ".join(str((first + n) % task.marks) for n in range(many))
        asked = COUNT.format(many=NUMBERS[many], first=first)
        yield {"__key__": f"text{i:06d}", "json": {"user": asked, "assistant": answer, "source": "hunt/text"}}


def blind_loss(task: SyntheticTask, frames: float | None = None) -> float:
    """What the best model reaches on the answers without a picture: marks are independent and all alike, so each costs
    ln(marks), and the token that ends the answer nothing. `frames`: of a clip, in the mean; a picture has one. The
    task's own when None."""
    asked = task.frames if frames is None else frames
    return asked * math.log(task.marks) / (asked + 1)


@torch.no_grad()
def judge(
    task: SyntheticTask, model: FoveatedVLM, batches: Iterable[Batch], device: torch.device | str
) -> dict[str, float]:
    """Where the looks land on validation packs of this rank, added up over the ranks; the same on every rank. Beside
    it the blind loss of the clips and pictures that were scored; not when other samples were, like text.

    A look is on its object when the patch with the most attention, mean over layers and heads, is the object's. By
    chance means: on any one of the objects in the frame.
    """
    truth = json.loads((folder(task) / TRUTH).read_text())
    found: dict[str, list[float]] = {}
    marks, clips, others = 0, 0, 0
    for batch in batches:
        places = [truth.get(key.rpartition("/")[2], []) for key in batch.keys]
        marks += sum(map(len, places))  # one in every frame is asked for
        clips, others = clips + sum(map(bool, places)), others + places.count([])
        for name, weights in model.gaze(batch.to(device)).items():
            patches = maps(weights.cpu()).flatten(1)
            for i, place in enumerate(places):
                if not place:
                    continue
                looks = patches[(batch.look_segment == i).cpu()]
                cells = torch.tensor(place).expand(len(looks))  # a picture has one
                entry = found.setdefault(name, [0.0, 0.0, 0.0])
                entry[0] += float((looks.argmax(1) == cells).sum())
                entry[1] += float(looks.gather(1, cells[:, None]).sum())
                entry[2] += len(cells)
    marks, clips, others = (int(number) for number in distributed.sum_over_ranks([marks, clips, others]).tolist())
    facts = {}
    if clips and not others:
        facts["validation loss without a picture, at best"] = blind_loss(task, marks / clips)
    for name in ("coarse", "fine"):
        hits, mass, looks = distributed.sum_over_ranks(found.get(name, [0.0, 0.0, 0.0])).tolist()
        if looks:
            facts[f"{name} looks on the asked object"] = hits / looks
            facts[f"attention of {name} looks on it"] = mass / looks
    facts["looks on it by chance"] = 1 / max(task.objects)
    return facts
