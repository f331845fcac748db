"""The synthetic task as a data set (`synthetic.py` draws it): `make` writes shards, tokenizer and the places of the
asked objects below FOVLM_DATA, once. `train/synthetic_score.py` scores a model on it.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fovlm.config.schema import SyntheticTask
from fovlm.data.chat import SYSTEM
from fovlm.data.shards import write_shards
from fovlm.data.synthetic import COLOURS, QUESTION, SHAPES, Clips, generate, names
from fovlm.errors import UserError
from fovlm.fileio import locked, remove_unfinished, staged_dir
from fovlm.media.encode import encode_jpeg
from fovlm.paths import data_root

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
