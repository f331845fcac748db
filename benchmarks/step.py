"""Time of a training step, ours and a plain PyTorch loop's, in turns: python -m benchmarks.step [CASE ...]

    ways     plain (fused AdamW, clipping, autocast where the case is bf16), zero1, zero2, zero2_offload
    modes    eager, compiled

Random weights, one pack a step and rank. A case and mode is one process a rank: its ways step in turns on the same
packs, so that a busy machine slows all of them. With `--ranks 2` the plain loop is under DistributedDataParallel. Time
is wall time on a GPU and process time on a CPU, one thread, of the first rank. MFU counts the model's own FLOPs,
without padding and recomputation. On one rank it writes benchmarks/results/step_DEVICE.csv and a plot.
"""

import argparse
import csv
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import LLM_135M, REAL, SMALL
from benchmarks.samples import draw
from fovlm.config.deepspeed import resolve
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, TrainSettings
from fovlm.data.packing import Batch, PackSize, Sample, collate
from fovlm.estimate.flops import mean_cost, peak_flops, total
from fovlm.estimate.shapes import geometry
from fovlm.train.losses import text_loss, text_weight
from fovlm.train.throughput import device_name
from kernels.bench import origin

RESULTS = Path(__file__).parent / "results"
LLM_1B7 = LLM_135M | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
BASE = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 518}
LARGE = {"llm": LLM_1B7, "encoder": BASE, "frame_size": 224, "grad_checkpoint": ["encoder", "llm"]}
WAYS = ("plain", "zero1", "zero2", "zero2_offload")
# name -> model, its samples: (how many, frames, looks, text tokens), ways
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int], tuple[str, ...]]] = {
    "small video": (SMALL, (2, 8, 8, 96), WAYS),
    "135M video": (REAL, (8, 16, 16, 128), WAYS),
    "135M pictures x8": (REAL, (64, 1, 8, 64), WAYS),
    "135M one clip": (REAL, (1, 8, 8, 128), WAYS),
    "135M one picture": (REAL, (1, 1, 1, 16), WAYS),  # what is not forward and backward weighs most here
    "1.7B video": (LARGE, (4, 16, 16, 128), ("zero2_offload",)),
}
DEFAULT = {
    "cpu": ["small video", "135M one clip", "135M one picture"],
    "cuda": ["135M video", "135M pictures x8", "135M one clip", "1.7B video"],
}


def experiment(case: str, way: str, precision: str) -> Experiment:
    model, (count, frames, _, text), _ = CASES[case]
    return Experiment(
        name="step",
        deepspeed="zero2" if way == "plain" else way,
        model=ModelSettings(**model, tokenizer="none"),
        data=DataSettings(
            sources={"a": DataSource(shards="a.tar", kind="video")}, mixture={"a": 1.0},
            pack_cost=count * (32 * frames + text), max_frames=frames, max_tokens=text,
        ),
        train=TrainSettings(steps=1, packs_per_step=1, precision=precision, best="train_loss"),  # type: ignore[arg-type]
    )  # fmt: skip


def pack(case: str, frame_size: int, vocabulary: int) -> Batch:
    """The case's samples in one pack."""
    count, frames, looks, text = CASES[case][1]
    samples = draw([(frames, looks, text, 0)] * count, frame_size, vocabulary, Sample)
    return collate(samples, frame_size)


def plain_step(e: Experiment, batch: Batch, device: torch.device, compiled: bool) -> Callable[[], Any]:
    """A step as a plain loop has it: fp32 weights, autocast in bf16, DistributedDataParallel on several ranks."""
    from fovlm import distributed
    from fovlm.model.build import build

    model = build(e.model).to(device).train()
    if e.train.precision == "bf16":
        model.encoder.attention = "plain"  # under autocast rows and weights have two types
    if compiled:
        model.compile_layers()
    rates = {"connector": e.optim.lr_connector, "encoder": e.optim.lr_encoder, "llm": e.optim.lr_llm}
    groups = [{"params": parameters, "lr": rates[name]} for name, parameters in model.groups().items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=e.optim.weight_decay, fused=True)
    many = distributed.world() > 1
    scale = distributed.world() / float(distributed.sum_over_ranks([float(text_weight(batch))]))
    forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if many else model

    def step() -> None:
        here = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=e.train.precision == "bf16"):
            loss = text_loss(forward(here), here).total * scale
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(e: Experiment, batch: Batch, device: torch.device, compiled: bool) -> Callable[[], Any]:
    """A step of the engine as the trainer takes it, its result read."""
    from fovlm.model.build import build
    from fovlm.train.engine import Engine

    model = build(e.model)
    if compiled:
        model.compile_layers()
    trained = Engine(model, e.optim, resolve(e, 1, device.type), device)
    return lambda: trained.step([batch])()


def measure(case: str, ways: list[str], compiled: bool, rounds: int, precision: str) -> list[dict[str, Any]]:
    """All ways of a case in this process, in turns. Every rank gets as many samples, drawn for itself."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if any(way != "plain" for way in ways):
        from fovlm.train.engine import start

        device = start()
    cuda = device.type == "cuda"
    e = experiment(case, ways[0], precision)
    shapes = geometry(e.model)
    torch.manual_seed(int(os.environ["RANK"]))
    batch = pack(case, e.model.frame_size, shapes.llm.V)
    count, frames, looks, text = CASES[case][1]
    flops = count * total(mean_cost(e, shapes, [PackSize(frames, looks, text, 0)])).total
    steps, seconds, peaks = {}, {way: [] for way in ways}, dict.fromkeys(ways, 0.0)
    for way in ways:
        torch.manual_seed(0)
        make = plain_step if way == "plain" else engine_step
        steps[way] = make(experiment(case, way, precision), batch, device, compiled)
    for n in range(rounds + 2):
        for way, step in steps.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter() if cuda else time.process_time()
            step()
            if cuda:
                torch.cuda.synchronize()
                peaks[way] = torch.cuda.max_memory_allocated() / 1e9
            if n > 1:  # the first two allocate and compile
                seconds[way].append((time.perf_counter() if cuda else time.process_time()) - began)
    many = os.environ["WORLD_SIZE"] != "1"
    peak, plain = peak_flops(device_name(device)), statistics.median(seconds["plain"]) if "plain" in seconds else None
    rows = []
    for way, taken in seconds.items():
        median = statistics.median(taken)
        rows.append({
            "case": case, "way": "ddp" if way == "plain" and many else way,
            "mode": "compiled" if compiled else "eager", "precision": precision,
            "ms": round(1e3 * median, 2), "ms_min": round(1e3 * min(taken), 2), "ms_max": round(1e3 * max(taken), 2),
            "samples_per_s": round(count / median, 3), "plain_over_this": round(plain / median, 3) if plain else "",
            "mfu": round(flops / median / peak, 4) if peak else "", "peak_gb_of_process": round(peaks[way], 2) or "",
        })  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar for each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1.2))
    names = [f"{row['case']}, {row['mode']}, {row['way']}" for row in rows]
    axes.barh(names, [row["ms"] for row in rows], color=["#888" if r["way"] == "plain" else "#c2410c" for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"ms a step, median ({rows[0]['device']})")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    """Each case and mode in a process of its own; returns 1 when one failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--modes", nargs="+", default=["eager"] if device == "cpu" else ["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=5 if device == "cpu" else 20)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32" if device == "cpu" else "bf16")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    has_deepspeed = find_spec("deepspeed") is not None
    if options.one:
        case, mode = options.one
        ways = [way for way in CASES[case][2] if way in options.ways and (way == "plain" or has_deepspeed)]
        print("rows", json.dumps(measure(case, ways, mode == "compiled", options.rounds, options.precision)))
        return 0
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"unknown case {unknown.pop()!r}: choose from {', '.join(CASES)}")
    if not has_deepspeed:
        print("deepspeed is not installed: the plain loop alone is timed (pip install deepspeed==0.19.8)")
    about, rows, failed = origin(device), [], False
    for case in options.cases or DEFAULT[device]:
        if not has_deepspeed and "plain" not in CASES[case][2]:
            continue
        for mode in options.modes:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            command = [sys.executable, "-m", "benchmarks.step", "--one", case, mode, "--ways", *options.ways]
            command += ["--rounds", str(options.rounds), "--precision", options.precision]
            world = {"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes = [
                subprocess.Popen(
                    command,
                    env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    text=True,
                )
                for rank in range(options.ranks)
            ]
            said, errors = processes[0].communicate()
            for process in processes[1:]:
                process.wait()
            found = re.search(r"^rows (.*)$", said, re.MULTILINE)
            if not found:
                failed = True
                print(f"{case}, {mode}: failed: {errors.strip()[-1500:]}")
                continue
            for row in json.loads(found[1]):
                print("  ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
                rows.append(row | about)
    if rows and options.ranks == 1:
        path = RESULTS / f"step_{'cpu' if device == 'cpu' else about['device'].replace(' ', '_')}.csv"
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        plot(rows, path.with_suffix(".png"))
        print(f"wrote {path} and {path.with_suffix('.png')}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
