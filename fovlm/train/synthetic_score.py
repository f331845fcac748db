"""How well a model does at the synthetic task beside its loss: whether it looks at the object that is asked for."""

import json
import math
from collections.abc import Iterable

import torch

from fovlm import distributed
from fovlm.checkpoint.run_folder import BLIND
from fovlm.config.schema import SyntheticTask
from fovlm.data.packing import Batch
from fovlm.data.synthetic import TRUTH, folder
from fovlm.model.modeling import FoveatedVLM
from fovlm.viz.heatmap import maps


def blind_loss(task: SyntheticTask, frames: float | None = None) -> float:
    """The best possible loss on the answers without seeing, nats per token; `frames` per clip (default: the task's).

    Marks are independent and uniform, so each costs ln(marks), and the token that ends the answer costs nothing.
    """
    frames = task.frames if frames is None else frames
    return frames * math.log(task.marks) / (frames + 1)


@torch.no_grad()
def score_looks(
    task: SyntheticTask, model: FoveatedVLM, batches: Iterable[Batch], device: torch.device | str
) -> dict[str, float]:
    """Where the looks land on this rank's validation packs, summed over the ranks; the same on every rank.

    A look is on its object when the patch with the most attention (mean over layers and heads) is the object's; by
    chance it is on any object of the frame. With it comes the blind loss of the samples, unless some are of another
    kind, such as text.
    """
    truth = json.loads((folder(task) / TRUTH).read_text())
    sums = {name: [0.0, 0.0, 0.0] for name in ("coarse", "fine")}  # hits, attention on the object, looks
    marks, clips, others = 0, 0, 0
    for batch in batches:
        places = [truth.get(key.rpartition("/")[2], []) for key in batch.keys]
        marks += sum(map(len, places))  # one per frame is asked for
        clips, others = clips + sum(map(bool, places)), others + places.count([])
        for name, weights in model.gaze(batch.to(device)).items():
            patches = maps(weights.cpu()).flatten(1)
            for i, place in enumerate(places):
                if not place:
                    continue
                looks = patches[(batch.look_segment == i).cpu()]
                cells = torch.tensor(place).expand(len(looks))  # an image has one
                sums[name][0] += float((looks.argmax(1) == cells).sum())
                sums[name][1] += float(looks.gather(1, cells[:, None]).sum())
                sums[name][2] += len(cells)
    marks, clips, others = (int(number) for number in distributed.sum_over_ranks([marks, clips, others]).tolist())
    facts = {}
    if clips and not others:
        facts[BLIND] = blind_loss(task, marks / clips)
    for name, parts in sums.items():
        hits, mass, looks = distributed.sum_over_ranks(parts).tolist()
        if looks:
            facts[f"{name} looks on the asked object"] = hits / looks
            facts[f"attention of {name} looks on it"] = mass / looks
    facts["looks on it by chance"] = 1 / max(task.objects)
    return facts
