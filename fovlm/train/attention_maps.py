"""Attention maps during training: where the model looks in the same ten validation clips, at every evaluation.

    maps/step-00000200.png   a row of frames for each clip, coarse looks above fine ones
    maps/step-00000200.npz   the weights behind it: see `save_maps`
    maps/index.html          all of them, with a slider over the steps

The clips are the first ten of the validation order that have frames: the same at every evaluation and on any number of
ranks.
"""

import json
from dataclasses import astuple
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fovlm.data.chat import template
from fovlm.data.dataset import Dataset
from fovlm.data.packing import Batch, PackBudget, Sample, collate, pack_samples
from fovlm.media import decode
from fovlm.model.modeling import FoveatedVLM
from fovlm.viz.contact_sheet import Strip, draw_sheet
from fovlm.viz.heatmap import maps

CLIPS = 10
MOST_LOOKS = 8  # of a clip, evenly spaced
SEARCHED = 1000  # positions that are searched for clips: a set may be mostly text


def watched_samples(val_set: Dataset, clips: int = CLIPS) -> list[Sample]:
    """The first `clips` samples of a validation set that have frames (the first of each pair), or as many as there are.

    A pure function of the set, independent of rank, step and packs.
    """
    once = min(len(val_set.samples) * max(val_set.samples.values()), SEARCHED)  # sources are mixed evenly
    found: dict[tuple[str, str], Sample] = {}
    for position in range(once):
        if len(found) < clips and val_set.size(position).frames:
            for sample in val_set.read(position)[0][:1]:
                found.setdefault((sample.source, sample.key), sample)
    return list(found.values())


def packs(samples: list[Sample], budget: PackBudget) -> list[Batch]:
    """The samples in packs of the run's own budget, for which it has the memory."""
    batches, left = [], samples
    while left:
        sizes = np.array([astuple(sample.size) for sample in left])
        _, taken = pack_samples(sizes, 1, budget)
        batches.append(collate(left[:taken], left[0].frames.shape[-1]))
        left = left[taken:]
    return batches


def save_maps(
    model: FoveatedVLM,
    samples: list[Sample],
    budget: PackBudget,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    step: int,
    device: torch.device | str = "cpu",
) -> Path | None:
    """Draw where the model looks in the samples after `step` steps -> the PNG's path in `folder`; None without samples.

    Beside it an .npz: `coarse` and (foveated) `fine` f16 [layers, k, H, N] (N: CLS, then the patches by row); of each
    of the k looks `clip` i64 [k], the number of its clip, and `look` i64 [k], its number there; `keys` and `texts` name
    the clips.
    """
    if not samples:
        return None
    weights: dict[str, list[torch.Tensor]] = {}
    frames, clip, look = [], [], []
    done = 0
    for batch in packs(samples, budget):
        gaze = model.gaze(batch.to(device))
        frame_of_look = batch.frame_of_look if batch.frame_of_look is not None else torch.arange(len(batch.frames))
        for number in range(len(batch.keys)):
            mine = (batch.look_segment == number).nonzero()[:, 0]
            shown = decode.spread(len(mine), MOST_LOOKS)
            for name, w in gaze.items():
                weights.setdefault(name, []).append(w[:, mine[shown].to(w.device)].float().cpu())
            frames.append(batch.frames[frame_of_look[mine[shown]]])
            clip += [done + number] * len(shown)
            look += shown
        done += len(batch.keys)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [_text(sample, tokenizer) for sample in samples]
    path = folder / f"step-{step:08d}.png"
    strips = [
        Strip(shown, {name: maps(parts[n]) for name, parts in weights.items()}, texts[n])
        for n, shown in enumerate(frames)
    ]
    columns = max(1, min(CLIPS // 2, MOST_LOOKS // max(map(len, frames))))
    draw_sheet(strips, path, columns=columns, dpi=100)
    arrays: dict[str, Any] = {name: torch.cat(parts, dim=1).half().numpy() for name, parts in weights.items()}
    arrays |= {"clip": np.array(clip), "look": np.array(look)}
    arrays |= {"keys": np.array([sample.key for sample in samples]), "texts": np.array(texts)}
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    _write_index(folder)
    return path


def _text(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Question and answer of a sample, without the system message and the roles."""
    head, middle, _ = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in template(tokenizer))
    text, n = sample.tokens.tolist()[len(head) :], len(middle)
    at = next((i for i in range(len(text)) if text[i : i + n] == middle), len(text))
    parts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (text[:at], text[at + n :]))
    return " ".join(" → ".join(parts).split())[:100]


def _write_index(folder: Path) -> None:
    """Write the page with a slider over the pictures of all evaluations so far."""
    steps = [[int(p.stem.removeprefix("step-")), p.name] for p in sorted(folder.glob("step-*.png"))]
    page = files("fovlm.viz").joinpath("maps.html").read_text(encoding="utf-8")
    (folder / "index.html").write_text(page.replace("%STEPS%", json.dumps(steps)), encoding="utf-8")
