"""Where the looks of the study of scenes land: the pointing game, what does not know the question, and faithfulness."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks.scene_looks import Looks, Question, Scenes, encode, walk
from fovlm.eval.controls import is_foreign
from fovlm.viz.contact_sheet import Strip, draw_sheet
from fovlm.viz.heatmap import maps

HIDDEN = 9  # patches that the test of faithfulness hides
SHOWN = 8  # scenes of the figure


def gaze(looks: Looks, batch: dict[str, Any], query: Tensor) -> Tensor:
    """Where queries [B, F, Q] look in the asked frames: f32 [B, side, side], mean over layers and heads."""
    seen: list[Tensor] = []
    asked = (torch.arange(len(query)), batch["frame"])
    looks.look(looks.model.connector.query_in(query[asked]), batch["seen"][asked], seen)
    return maps(torch.stack(seen))


def pointing(grid: Tensor, boxes: Tensor, size: int) -> dict[str, list[float]]:
    """Of maps [B, side, side]: is the center of the brightest patch in the box, the share of attention whose patch has
    its center there, and the share of such patches, which is what a look anywhere would score."""
    side = grid.shape[1]
    centers = (torch.arange(side) + 0.5) * size / side
    left, top, right, bottom = boxes.T[:, :, None]
    inside = ((centers >= top) & (centers <= bottom))[:, :, None] & ((centers >= left) & (centers <= right))[:, None]
    flat, inside = grid.flatten(1), inside.flatten(1)
    return {
        "pointing": inside.gather(1, flat.argmax(1, keepdim=True))[:, 0].float().tolist(),
        "mass": ((flat * inside).sum(1) / flat.sum(1)).tolist(),
        "anywhere": inside.float().mean(1).tolist(),
    }


@torch.no_grad()
def baselines(looks: Looks, scenes: Scenes, source: str) -> dict[str, dict[str, float]]:
    """Pointing of what does not know the question: the coarse look, the encoder's own CLS, a look at the center."""
    (batch,), found = scenes.batches(scenes.questions[source]), {}
    seen: list[Tensor] = []
    pixels = scenes.frames(source, [0])
    cls = looks.model.encoder.embed(pixels)[0][0, 0]
    looks.look(cls.float().expand(len(batch["seen"]), -1), batch["seen"][:, 0], seen)
    grid = maps(torch.stack(seen))
    side = grid.shape[1]
    far = (torch.arange(side) - (side - 1) / 2) ** 2
    center = torch.exp(-(far[:, None] + far) / (side / 4) ** 2 / 2).expand_as(grid)
    coarse = gaze(looks, batch, looks.model.connector.q_static.expand(*batch["seen"].shape[:2], -1))
    for name, shown in (("coarse", coarse), ("CLS", grid), ("center", center)):
        found[name] = {k: float(np.mean(v)) for k, v in pointing(shown, batch["boxes"], scenes.size).items()}
    return found


@torch.no_grad()
def outliers(looks: Looks, scenes: Scenes, source: str) -> list[float]:
    """The largest norm of a patch over the median one, behind each layer of the encoder: 16 frames of a source."""
    encoder, frames = looks.model.encoder, scenes.frames(source, list(range(min(16, len(scenes.jpegs[source])))))
    norms = [x[:, encoder.prefix :].norm(dim=-1) for x, _ in walk(encoder, frames)]
    return [float(one.max() / one.median()) for one in norms]


@torch.no_grad()
def controls(looks: Looks, scenes: Scenes, source: str) -> dict[str, dict[str, float]]:
    """Loss and accuracy with information removed, named as in `fovlm/eval/controls.py`: no frames, frames in another
    order, the middle frame in place of all, and looks with the queries of other questions. `questions` were scored."""
    sums: dict[str, dict[str, list[float]]] = {}
    for batch in scenes.batches(scenes.questions[source]):
        seen, options = batch["seen"], {"blind": {"seen": batch["seen"][:, :0]}}
        if (F := seen.shape[1]) > 1:
            options["shuffled"] = {"seen": seen.roll(1, 1)}
            options["repeated"] = {"seen": seen[:, [F // 2] * F]}
        if looks.model.config.visual == "foveated":
            options["foreign"] = {}
        for name, changed in options.items():
            others = other_questions(batch) if name == "foreign" else None
            scored = slice(None) if others is None else [n for n, other in enumerate(others) if other != n]
            nll, right, _ = looks.nll(batch | changed, gaze_of=others)
            row = sums.setdefault(name, {"loss": [], "accuracy": []})
            row["loss"] += nll[scored].tolist()
            row["accuracy"] += right[scored].float().tolist()
    means = {name: {k: float(np.mean(v)) for k, v in row.items()} for name, row in sums.items() if row["loss"]}
    return {name: found | {"questions": len(sums[name]["loss"])} for name, found in means.items()}


def other_questions(batch: dict[str, Any]) -> list[int]:
    """The number of the next question, cyclically, that is foreign to each; its own where there is none."""
    asked, clips = batch["tokens"][:, : batch["prompt"]], batch["clips"].tolist()

    def next_to(n: int) -> int:
        others = [*range(n + 1, len(clips)), *range(n)]
        return next((m for m in others if is_foreign(clips[n], asked[n], clips[m], asked[m])), n)

    return [next_to(n) for n in range(len(clips))]


@torch.no_grad()
def faithfulness(looks: Looks, scenes: Scenes, source: str) -> dict[str, float]:
    """The loss when the HIDDEN patches that a look attends to most are painted over, and as many others at random."""
    questions = scenes.questions[source][:96]
    (batch,) = scenes.batches(questions)
    nll, _, query = looks.nll(batch)
    grid = gaze(looks, batch, query)
    side, random = grid.shape[1], torch.Generator().manual_seed(0)
    top = grid.flatten(1).topk(HIDDEN).indices
    others = torch.rand(grid.flatten(1).shape, generator=random).scatter(1, top, -1.0).topk(HIDDEN).indices
    frames = scenes.frames(source, [q.picture for q in questions])
    found = {"as it is": float(nll.mean())}
    for name, which in (("where it looks", top), ("elsewhere", others)):
        hidden = torch.zeros(grid.flatten(1).shape, dtype=torch.bool).scatter(1, which, True).view(-1, 1, side, side)
        pixels = nnf.interpolate(hidden.float(), frames.shape[-1:] * 2) > 0
        painted = torch.where(pixels, frames.float().mean((2, 3), keepdim=True).to(torch.uint8), frames)
        parts = [encode(looks.model, painted[n : n + 16])[1] for n in range(0, len(painted), 16)]
        found[name] = float(looks.nll(batch | {"seen": torch.cat(parts)[:, None]})[0].mean())
    return found


@torch.no_grad()
def figure(looks: Looks, scenes: Scenes, source: str, path: Path) -> None:
    """SHOWN scenes with their question and answer, and where the look that it steers attends."""
    questions = scenes.questions[source][::4][:SHOWN]
    (batch,) = scenes.batches(questions)
    grid = gaze(looks, batch, looks.nll(batch)[2])
    frames = torch.cat([scenes.frames(source, [q.picture]) for q in questions])

    def title(question: Question) -> str:
        return question.words.removeprefix("what is in ").removeprefix("where is the ").replace(" ? ", ": ")

    strips = [Strip(frames[n : n + 1], {"": grid[n : n + 1]}, title=title(q)) for n, q in enumerate(questions)]
    draw_sheet(strips, path, columns=4, width=9, dpi=100)
