"""Where the encoder attends to keys and values and where to rows: python -m benchmarks.attention_forms

A DINOv2-small of random weights and the looks at its frames, forward and backward, with rows in no layer (`none`:
keys and values in every one), in the last layer (`last`) or in all of them (`all`). `layer` is the last layer alone,
with the coarse row and as many looks at each frame; `encoder` all twelve layers, trainable, with checkpointed layers,
or frozen. Milliseconds of processor time of one thread, which other processes change little: medians of rounds in which
all forms take turns, in fp32. `kept_mb` is what one more frame keeps for the backward pass in bf16, its looks included.
Writes benchmarks/results/attention_forms.csv.
"""

import csv
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from benchmarks.memory import Live
from fovlm.model.encoder import Encoder, look_layer, walk_layer

RESULTS = Path(__file__).parent / "results" / "attention_forms.csv"
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224}
FRAMES, ROWS, HEAD = 4, 257, 64
LOOKS = {"layer": (1, 4, 16, 64), "encoder": (1, 8)}  # at each frame
STATES = ("trainable", "checkpointed", "frozen")
REPEAT = 5


def spread(frames: int, per_frame: int) -> Tensor | None:
    return None if per_frame == 1 else torch.arange(frames * per_frame) // per_frame


def layer_step(encoder: Encoder, form: str, per_frame: int) -> Callable[[], None]:
    """The last layer over given rows, the coarse row with them."""
    layer, D = encoder.layers[-1], encoder.width
    hidden = torch.randn(FRAMES, ROWS + 1, D)
    query, looks = torch.randn(FRAMES * per_frame, D), spread(FRAMES, per_frame)

    def step() -> None:
        x, q = hidden.clone().requires_grad_(encoder.trainable), query.clone().requires_grad_()
        with torch.set_grad_enabled(encoder.trainable):
            coarse, kept = walk_layer(encoder.family, layer, x, ROWS, HEAD, True, form != "none", None)
        (look_layer(encoder.family, layer, q, kept, looks, HEAD).square().sum() + coarse.square().sum()).backward()

    return step


def encoder_step(encoder: Encoder, form: str, per_frame: int) -> Callable[[], None]:
    frames = torch.randint(0, 256, (FRAMES, 3, 224, 224), dtype=torch.uint8)
    row, query = torch.randn(encoder.width), torch.randn(FRAMES * per_frame, encoder.width)
    looks = spread(FRAMES, per_frame)

    def step() -> None:
        encoder.attention = form
        r, q = row.clone().requires_grad_(), query.clone().requires_grad_()
        cache, coarse = encoder.encode(frames, r)
        (encoder.look(q, cache, looks).square().sum() + coarse.square().sum()).backward()

    return step


def kept_mb(encoder: Encoder, form: str, per_frame: int) -> float:
    """MB that live after the forward pass for one more frame."""
    encoder.attention = form
    live = []
    for F in (2, 4):
        frames = torch.randint(0, 256, (F, 3, 224, 224), dtype=torch.uint8)
        row, query = (torch.ones(n, encoder.width, requires_grad=True) for n in (1, F * per_frame))
        with Live() as now:
            cache, coarse = encoder.encode(frames, row[0])
            out = encoder.look(query, cache, spread(F, per_frame)).sum() + coarse.sum()
            del cache, coarse
            gc.collect()
            live.append(now.now / 1e6)
            del out
    return (live[1] - live[0]) / 2


def measure(what: str, state: str, per_frame: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    encoder = Encoder(Dinov2Model(Dinov2Config(**SMALL)), recompute=state == "checkpointed")
    encoder.requires_grad_(state != "frozen")
    make, forms = (layer_step, ("none", "last")) if what == "layer" else (encoder_step, ("none", "last", "all"))
    steps = {form: make(encoder, form, per_frame) for form in forms}
    times: dict[str, list[float]] = {form: [] for form in forms}
    for step in steps.values():
        step()  # makes the gradients
    for _ in range(REPEAT if what == "encoder" else 2 * REPEAT):
        for form, step in steps.items():
            start = time.process_time()
            step()
            times[form].append(1e3 * (time.process_time() - start))
    kept = {form: kept_mb(encoder.bfloat16(), form, per_frame) if what == "encoder" else "" for form in forms}
    rows = []
    for form in forms:
        cut = statistics.quantiles(times[form], n=5)
        row = {"what": what, "state": state, "looks_per_frame": per_frame, "form": form}
        row |= {"ms": statistics.median(times[form]), "ms20": cut[0], "ms80": cut[-1], "kept_mb": kept[form]}
        rows.append({name: round(cell, 2) if isinstance(cell, float) else cell for name, cell in row.items()})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for what, counts in LOOKS.items():
        for state in STATES:
            if (what, state) == ("layer", "checkpointed"):
                continue
            for per_frame in counts:
                rows += measure(what, state, per_frame)
                for row in rows[-3 if what == "encoder" else -2 :]:
                    print(*row.values(), sep="  ", flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
