"""The text of `./launch.sh NAME --dry-run`: all that can be computed about a run before it starts.

Nothing is downloaded or indexed, and no weights are made: shapes come from `shapes.py`, FLOPs from `flops.py`, bytes
from `memory.py`, and the samples' sizes from the index of the shards where there is one.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fovlm.config.deepspeed import resolve
from fovlm.config.schema import TINY_TOKENIZERS, Experiment
from fovlm.data.dataset import open_dataset, pack_budget
from fovlm.data.index import stored_indices
from fovlm.data.packing import EMPTY, PackSize, pack_samples, pack_shape, round_up
from fovlm.data.sampling import MixtureSampler
from fovlm.data.shard_cache import RemoteShard, Shard, shard_cache
from fovlm.data.shards import URL, find_shards
from fovlm.data.tokenizers import open_tokenizer, tokenizer_path
from fovlm.errors import UserError
from fovlm.estimate.flops import PEAKS, largest, mean_cost, peak_flops, samples_for, total
from fovlm.estimate.memory import activations, estimate
from fovlm.estimate.shapes import Geometry, geometry, parameters
from fovlm.model.build import check_vocabulary
from fovlm.model.precision import settle
from fovlm.paths import cache_root, data_root
from fovlm.tables import text_table

MFU = (0.2, 0.3, 0.4, 0.5)  # shares of a GPU's peak for which a step's time is printed
SIZED = 2000  # samples whose mean size is taken for all


def describe(experiment: Experiment, world_size: int, device: str | None = None) -> str:
    """The dry run for `world_size` ranks on `device` ("cuda" or "cpu"; None: a GPU if there is one). Raises UserError
    for settings that cannot run, as the run itself would."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    experiment = settle(experiment, device)
    deepspeed = resolve(experiment, world_size, device)
    shapes = geometry(experiment.model)
    if Path(tokenizer := tokenizer_path(experiment)).is_dir() or tokenizer == "bytes":
        check_vocabulary(shapes.llm.V, len(open_tokenizer(experiment)))
    sizes, why_bound = sizes_of(experiment)
    long = length(experiment, shapes, sizes)
    fetched = _fetched(experiment)
    parts = [
        f"{experiment.name}: {experiment.note}" if experiment.note else experiment.name,
        _section("experiment", experiment.dump().rstrip()),
        _section(f"DeepSpeed, {world_size} x {device}", json.dumps(deepspeed, indent=2)),
        *([_section("remote shards", fetched)] if fetched else []),
        _section("parameters", _parameters(experiment, shapes)),
        _section("FLOPs per sample", _flops(experiment, shapes, sizes, why_bound)),
        _section("length", _length(experiment, long, why_bound)),
        _section("packs", _packs(long, shapes, world_size, device)),
        _section("memory per rank (estimated)", _memory(experiment, shapes, deepspeed, world_size, device)),
    ]
    return "\n\n".join(parts)


def sizes_of(experiment: Experiment) -> tuple[list[PackSize], str]:
    """The sizes of the first training samples; where they are not known yet the largest that the settings allow, and
    why."""
    found = known_sizes(experiment)
    return (largest_sizes(experiment), found) if isinstance(found, str) else (found, "")


def known_sizes(experiment: Experiment) -> list[PackSize] | str:
    """The sizes of the first training samples; or why they are not known: the shards have no index yet."""
    task = experiment.data.generate
    if task and not (data_root() / task.folder / "task.json").is_file():
        return "the synthetic task has no shards yet (the run makes them)"
    try:
        for name in experiment.data.mixture:
            for shard in _shards(experiment, name):
                if isinstance(shard, RemoteShard) and not shard.path.is_file():
                    return f"{shard.name} of {name} is not in the cache (the run fetches it)"
                if next(stored_indices(shard, cache_root(), experiment.data.sources[name].fields), None) is None:
                    return f"{shard.name} of {name} has no index yet (the run makes it)"
        tokenizer = tokenizer_path(experiment)
        if not Path(tokenizer).is_dir() and tokenizer not in TINY_TOKENIZERS:
            return "the tokenizer is not local yet"
        dataset = open_dataset(experiment, open_tokenizer(experiment), experiment.data.mixture)
    except UserError as error:
        return str(error)
    return [PackSize(*row) for row in dataset.sizes(0, SIZED).tolist()]


def _shards(experiment: Experiment, name: str) -> list[Shard]:
    return find_shards(name, experiment.data.sources[name].shards, shard_cache(experiment.data))


def _fetched(experiment: Experiment) -> str:
    """What the run will fetch of each source with remote shards; empty without one."""
    cache, data = shard_cache(experiment.data), experiment.data
    rows = [["source", "shards", "size", "in the cache", "to fetch"]]
    for name in dict.fromkeys([*data.mixture, *data.val]):
        if not URL.match(data.sources[name].shards):
            continue
        shards = [shard for shard in _shards(experiment, name) if isinstance(shard, RemoteShard)]
        here = [shard for shard in shards if shard.path.is_file()]
        size, cached = (sum(shard.file.size for shard in some) for some in (shards, here))
        rows.append([name, f"{len(shards)}", *(f"{metric(n)}B" for n in (size, cached, size - cached))])
    limit = f"\ninto {cache.folder}, which holds {metric(cache.limit)}B of shards at most (data.cache_gb)"
    return text_table(rows) + limit if len(rows) > 1 else ""


def largest_sizes(experiment: Experiment) -> list[PackSize]:
    """The first samples of the run in order, each of its source's largest size."""
    mix = MixtureSampler(experiment.data.mixture, experiment.data.first)
    shapes = [largest(experiment, name) for name in mix.names]
    return [shapes[source] for source in mix.window(0, SIZED)[0].tolist()]


def _parameters(experiment: Experiment, shapes: Geometry) -> str:
    counts = parameters(experiment, shapes)
    rows = [[name, f"{count.trainable:,}", f"{count.frozen:,}"] for name, count in counts.items()]
    rows.append(["all", *(f"{sum(getattr(c, kind) for c in counts.values()):,}" for kind in ("trainable", "frozen"))])
    return text_table([["", "trained", "frozen"], *rows])


def _flops(experiment: Experiment, shapes: Geometry, sizes: list[PackSize], why_bound: str) -> str:
    said = f"mean of the first {len(sizes)} samples: {_mean(sizes)}"
    if why_bound:
        said = f"AT MOST, with every sample as large as the settings allow ({_mean(sizes)}), since {why_bound}"
    parts = mean_cost(experiment, shapes, sizes)
    rows = [
        [name, *map(metric, (cost.forward, cost.backward, cost.total, cost.recompute))]
        for name, cost in (parts | {"all": total(parts)}).items()
    ]
    return text_table([["", "forward", "backward", "both", "recomputed"], *rows]) + "\n" + said


def _mean(sizes: list[PackSize]) -> str:
    n = len(sizes)
    frames, looks, text = (sum(getattr(s, part) for s in sizes) / n for part in ("frames", "looks", "text"))
    return f"{frames:.1f} frames, {looks:.1f} looks, {text:.0f} text tokens"


class Length(NamedTuple):
    """How long a run is: samples and steps, and the FLOPs of one sample, forward and backward."""

    samples: float
    steps: int
    per_step: float
    per_sample: float
    packs: list[list[PackSize]]  # of the steps that the known samples fill
    packs_per_step: float

    @property
    def flops(self) -> float:
        return self.samples * self.per_sample


def length(experiment: Experiment, shapes: Geometry, sizes: list[PackSize]) -> Length:
    """The length of a run whose samples have these sizes."""
    train, (packs, steps) = experiment.train, plan(experiment, sizes)
    per_sample, per_step = total(mean_cost(experiment, shapes, sizes)).total, sum(map(len, packs)) / steps
    samples = train.steps * per_step if train.steps else train.samples or samples_for(train.flops or 0.0, per_sample)
    count = train.steps or math.ceil(samples / per_step)
    return Length(samples, count, per_step, per_sample, packs, len(packs) / steps)


def _length(experiment: Experiment, long: Length, why_bound: str) -> str:
    given = next(key for key in ("samples", "steps", "flops") if getattr(experiment.train, key))
    rows = [
        ["samples", f"{long.samples:,.0f}"],
        ["samples in a step", f"{long.per_step:,.1f}"],
        ["steps", f"{long.steps:,}"],
        ["FLOPs", metric(long.flops)],
    ]
    return text_table([["", f"from train.{given}"], *rows]) + (
        "\nwith the largest samples, as above" if why_bound else ""
    )


def plan(experiment: Experiment, sizes: Iterable[PackSize]) -> tuple[list[list[PackSize]], int]:
    """The packs of the steps that samples of these sizes fill, and the number of steps; of one step at least."""
    budget = pack_budget(experiment)
    left = np.array([astuple(size) for size in sizes])
    packs: list[list[PackSize]] = []
    steps = 0
    while len(left):
        contents, taken = pack_samples(left, experiment.train.packs_per_step, budget)
        if taken == len(left) and steps:  # the last step may not be full
            break
        packs += [[PackSize(*row) for row in left[pack].tolist()] for pack in contents]
        left, steps = left[taken:], steps + 1
    return packs, steps


def real_shares(packs: Iterable[list[PackSize]], tokens_per_look: int = 1) -> dict[str, float]:
    """Of what is computed for packs of these samples, the share that is not padding, by dimension."""
    real, whole = np.zeros(4), np.zeros(4)
    for sizes in packs:
        used = sum(sizes, EMPTY)
        shape = pack_shape(used, all(size.looks == size.frames for size in sizes))
        visual = used.looks * tokens_per_look
        ahead, sequence = visual + used.prompt, visual + used.text
        real += [used.frames, ahead, sequence, used.text]
        whole += [shape.frames, round_up(max(ahead, 1)), round_up(max(sequence, 1)), shape.text]
    return dict(zip(("frames", "prefix", "sequence", "text"), (real / whole).tolist(), strict=True))


def _packs(long: Length, shapes: Geometry, world_size: int, device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else ""
    gpu, peak = (name, known) if (known := peak_flops(name)) else ("H100", PEAKS["H100"])
    step = long.per_step * long.per_sample
    rows = [
        ["samples in a pack", f"{long.per_step / long.packs_per_step:,.1f}"],
        ["FLOPs of a pack", metric(step / long.packs_per_step)],
        *([f"real {part}", f"{share:.1%}"] for part, share in real_shares(long.packs, shapes.T).items()),
        *([f"a step at {mfu:.0%} MFU", f"{1e3 * step / (mfu * peak * world_size):,.1f} ms"] for mfu in MFU),
    ]
    assumed = f"MFU is an assumption, of {metric(peak)}FLOP/s dense bf16 ({gpu}) on each of {world_size}"
    return text_table([["", "mean"], *rows]) + f"\n{assumed}; waiting for data and other ranks comes on top"


def _memory(experiment: Experiment, shapes: Geometry, deepspeed: dict, world_size: int, device: str) -> str:
    said = estimate(experiment, shapes, deepspeed, world_size)
    names = ("weights", "gradients", "optimizer", "buckets", "activations", "device")
    rows = [[name, f"{getattr(said, name) / 1e9:.2f} GB"] for name in names]
    stored = activations(
        experiment, shapes, 2 if deepspeed["bf16"]["enabled"] else 4, stage=deepspeed["zero_optimization"]["stage"]
    )
    inside = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in stored.items() if size)
    slack = "without the CUDA context and the allocator's slack: 1-2 GB" if device == "cuda" else ""
    rows[4].append(inside)
    rows[5] = ["all", rows[5][1], slack]
    if said.host:
        rows.append(["in main memory", f"{said.host / 1e9:.2f} GB", "offloaded"])
    return text_table(rows, left=(0, 2))


def _section(title: str, text: str) -> str:
    return f"-- {title} " + "-" * max(1, 98 - len(title)) + "\n" + text


def metric(value: float) -> str:
    """1234567 -> `1.23 M`."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {letter}"
    return f"{value:.0f}"
