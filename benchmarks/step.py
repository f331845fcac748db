"""Time of a training step, ours and a plain PyTorch loop's, in turns: python -m benchmarks.step [CASE ...]

    ways     plain (fused AdamW, clipping, autocast where the case is bf16), zero1, zero2, zero2_offload
    modes    eager, compiled, graph (forward and backward pass of a pack are one replay of a CUDA graph each)

Random weights, one pack a step and rank. A case and mode is one process a rank: its ways step in turns on the same
packs, so that a busy machine slows all of them. With `--ranks 2` the plain loop is under DistributedDataParallel. Time
is wall time on a GPU and process time on a CPU, one thread, of the first rank. On one rank it writes
benchmarks/results/step_DEVICE.csv and a plot. Columns, where a device has them:

    mfu        of the model's own FLOPs, without padding and recomputation
    peak_gb    of this way alone: what it keeps, and what a step takes on top
    launches   of kernels, copies and graphs on a GPU; on a CPU operators that compute, eager
    waits      of the host for the GPU (torch.cuda.set_sync_debug_mode), reading the result included
    waiting    share of the time spent waiting for a pack of as many JPEG frames from the data loader
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

from benchmarks.gauges import counts, loaded_packs, versions, waiting
from benchmarks.graphed import use_graph
from benchmarks.memory import REAL, SMALL
from benchmarks.samples import LLM_135M, draw
from fovlm.config.deepspeed import resolve
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, TrainSettings
from fovlm.data.packing import Batch, PackSize, Sample, collate
from fovlm.estimate.flops import mean_cost, peak_flops, total
from fovlm.estimate.shapes import geometry
from fovlm.train.losses import text_weight
from fovlm.train.throughput import device_name
from kernels.bench import origin
from kernels.common import FAILURES, reason_of

RESULTS = Path(__file__).parent / "results"
LLM_1B7 = LLM_135M | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
BASE = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 518}
LARGE = {"llm": LLM_1B7, "encoder": BASE, "frame_size": 224, "grad_checkpoint": ["encoder", "llm"]}
WAYS = ("plain", "zero1", "zero2", "zero2_offload")
MODES = ("eager", "compiled", "graph")
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


def plain_step(e: Experiment, batch: Batch, device: torch.device, mode: str) -> Callable[[], Any]:
    """A step as a plain loop has it: fp32 weights, autocast in bf16, DistributedDataParallel on several ranks."""
    from fovlm import distributed
    from fovlm.model.build import build

    model = build(e.model).to(device).train()
    autocast = torch.autocast(device.type, torch.bfloat16, e.train.precision == "bf16", cache_enabled=mode != "graph")
    if e.train.precision == "bf16":
        model.encoder.attention = "none"  # under autocast rows and weights have two types
    if mode == "compiled":
        model.compile_layers()
    if mode == "graph":
        with autocast:
            use_graph(model, batch.to(device))
    rates = {"connector": e.optim.lr_connector, "encoder": e.optim.lr_encoder, "llm": e.optim.lr_llm}
    groups = [{"params": parameters, "lr": rates[name]} for name, parameters in model.groups().items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=e.optim.weight_decay, fused=True)
    many = distributed.world() > 1
    scale = distributed.world() / float(distributed.sum_over_ranks([float(text_weight(batch))]))
    forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if many else model

    def step() -> None:
        here = batch.to(device)
        with autocast:
            loss = forward(here, weight=here.weight) * scale
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(e: Experiment, batch: Batch, device: torch.device, mode: str) -> Callable[[], Any]:
    """A step of the engine as the trainer takes it, its result read."""
    from fovlm.model.build import build
    from fovlm.train.engine import Engine

    model = build(e.model)
    if mode == "compiled":
        model.compile_layers()
    trained = Engine(model, e.optim, resolve(e, 1, device.type), device)
    if mode == "graph":
        use_graph(model.train(), batch.to(device))
    return lambda: trained.step([batch])()


def measure(case: str, ways: list[str], mode: str, rounds: int, precision: str) -> list[dict[str, Any]]:
    """All ways of a case in this process, in turns. Every rank gets as many samples, drawn for itself."""
    cuda, many = torch.cuda.is_available(), os.environ["WORLD_SIZE"] != "1"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if any(way != "plain" for way in ways):
        from fovlm.train.engine import start

        start()
    elif many:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    clock = time.perf_counter if cuda else time.process_time
    e = experiment(case, ways[0], precision)
    shapes = geometry(e.model)
    torch.manual_seed(int(os.environ["RANK"]))
    batch = pack(case, e.model.frame_size, shapes.llm.V)
    count, frames, looks, text = CASES[case][1]
    flops = count * total(mean_cost(e, shapes, [PackSize(frames, looks, text, 0)])).total
    allocated = torch.cuda.memory_allocated if cuda else lambda: 0
    steps: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    for way in ways:
        torch.manual_seed(0)
        make, before = plain_step if way == "plain" else engine_step, allocated()
        try:
            step = make(experiment(case, way, precision), batch, device, mode)
            for _ in range(2):  # allocates and compiles
                step()
        except FAILURES as error:
            if mode == "eager":
                raise
            print(f"{case}, {mode}, {way}: not run: {reason_of(error)}", file=sys.stderr)
            continue
        steps[way], seconds[way], kept[way] = step, [], allocated() - before
    peaks = dict.fromkeys(steps, 0)
    for _ in range(rounds):
        for way, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before, began = allocated(), clock()
            step()
            if cuda:
                torch.cuda.synchronize()
                peaks[way] = max(peaks[way], torch.cuda.max_memory_allocated() - before + kept[way])
            seconds[way].append(clock() - began)
    loader = cuda and not many and find_spec("webdataset") is not None
    packs = loaded_packs(count, frames) if loader else iter(())
    if loader:
        next(packs)
    peak = peak_flops(device_name(device))
    plain = statistics.median(seconds["plain"]) if "plain" in seconds else None
    rows = []
    for way, taken in seconds.items():
        median = statistics.median(taken)
        rows.append({
            "case": case, "way": "ddp" if way == "plain" and many else way, "mode": mode, "precision": precision,
            "ms": round(1e3 * median, 2), "ms_min": round(1e3 * min(taken), 2), "ms_max": round(1e3 * max(taken), 2),
            "samples_per_s": round(count / median, 3), "plain_over_this": round(plain / median, 3) if plain else "",
            "mfu": round(flops / median / peak, 4) if peak else "", "peak_gb": round(peaks[way] / 1e9, 2) or "",
            **counts(steps[way], device, mode), "waiting": waiting(steps[way], packs, rounds) if loader else "",
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
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"] if device == "cpu" else MODES)
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
        print("rows", json.dumps(measure(case, ways, mode, options.rounds, options.precision)))
        return 0
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"unknown case {unknown.pop()!r}: choose from {', '.join(CASES)}")
    if not has_deepspeed:
        print("deepspeed is not installed: the plain loop alone is timed (pip install deepspeed==0.19.8)")
    if "graph" in options.modes and (device == "cpu" or options.ranks > 1):
        print("graph: not run, " + ("needs a GPU" if device == "cpu" else "captures the step of one rank"))
        options.modes = [mode for mode in options.modes if mode != "graph"]
    if device == "cuda" and options.ranks == 1 and not find_spec("webdataset"):
        print("waiting: not measured, webdataset is not installed (pip install webdataset)")
    about, rows, failed = origin(device) | versions(), [], False
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
            for line in re.findall(r"^.*: not run: .*$", errors, re.MULTILINE):
                print(line)
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
