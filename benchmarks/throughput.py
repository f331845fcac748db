"""Samples per CPU-second of this tree and of another one, alternating, by process time: `--against` is a worktree.

    git worktree add /tmp/base 3f48945
    python -m benchmarks.throughput --against /tmp/base [--mix "pictures x8"] [--engine] [--size 135M]

One thread, fp32: forward, backward and a fused AdamW step over one pack of a mix, drawn as in `benchmarks.packing`: the
default ablation mix (mean 5.7 frames, 14 % text), A8's data with 8 looks a picture, or one clip of 8 frames that fills
a pack exactly. Packs are those of the ablations' settings on either side. The model has random weights and a ninth of
the size of SmolLM2-135M with DINOv2-small, with the same ratio of the costs of a frame and a text token; with `--size
135M` their size. With `--engine` a step is that of each tree's training engine, in its default setting (ZeRO-2), on one
rank.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.samples import DINO_SMALL, LLM_135M, draw

FRAME = 224
LLM = {
    "vocab_size": 16384,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
ENCODER = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "image_size": FRAME, "patch_size": 14}
SIZES = {"small": (LLM, ENCODER), "135M": (LLM_135M, DINO_SMALL)}


@dataclass(frozen=True)
class Case:
    """A mix, the pack of 3f48945 for it (frames, looks, text) and the cost of a pack of this tree."""

    sizes: list[list[int]]
    before: tuple[int, int, int]
    cost: int
    size: str  # of the model
    engine: bool


def before(case: Case):
    """The model and the packs of 3f48945: separate budgets of frames and of text tokens."""
    from transformers import Dinov2Config

    from fovlm import batch, model  # type: ignore[attr-defined]

    sizes, budget = np.array(case.sizes), batch.Size(*case.before, 0)
    rows = [batch.Size(*row[:3], 0) for row in sizes.tolist()]
    llm, encoder = SIZES[case.size]
    config = model.FoveatedConfig(llm_config=LlamaConfig(**llm), dino_config=Dinov2Config(**encoder))
    packs, first = [], 0
    while len(packs) < 16:
        contents, taken = batch.fill_step(rows[first:], 8, budget)
        packs += [sizes[first:][pack] for pack in contents]
        first += taken
    return model.FoveatedVLM(config), packs, lambda samples: batch.collate(samples, budget, FRAME), batch.Sample


def after(case: Case):
    """The model and the packs of this tree."""
    from transformers import Dinov2Config

    from fovlm.data import packing
    from fovlm.model.configuration import FoveatedConfig
    from fovlm.model.modeling import FoveatedVLM

    llm, encoder = SIZES[case.size]
    config = FoveatedConfig(llm_config=LlamaConfig(**llm), encoder_config=Dinov2Config(**encoder))
    drawn, budget = np.array(case.sizes)[:, :4], packing.PackBudget(case.cost, 32)
    sizes = np.pad(drawn, ((0, 0), (0, 1)))  # none has further conversations
    packs, first = [], 0
    while len(packs) < 16:
        contents, taken = packing.pack_samples(sizes[first:], 8, budget)
        packs += [drawn[first:][pack] for pack in contents]
        first += taken
    return FoveatedVLM(config), packs, lambda samples: packing.collate(samples, FRAME), packing.Sample


def plain_step(model: Any, old: bool) -> Callable[[Any], Any]:
    """Forward, backward and AdamW over a batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(batch: Any) -> None:
        loss = (model(batch) * batch.weight).sum() if old else model(batch, weight=batch.weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(model: Any, old: bool) -> Callable[[Any], Any]:
    """A step of the tree's engine over a batch, its result read."""
    names = ("config", "deepspeed_config", "engine") if old else ("config.schema", "config.deepspeed", "train.engine")
    schema, deepspeed, engine = (import_module(f"fovlm.{name}") for name in names)
    data = {"sources": {"a": {"shards": "a.tar", "kind": "video"}}, "train" if old else "mixture": {"a": 1.0}}
    train = {"steps": 1, "packs_per_step": 1, "precision": "fp32", "best": "train_loss"}
    e = schema.Experiment.model_validate({"name": "step", "data": data, "train": train})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    trained = engine.Engine(model, e.optim, deepspeed.resolve(e, 1, "cpu"), engine.start())
    return lambda batch: trained.step([batch]) if old else trained.step([batch])()


def measure(rounds: int) -> None:
    """In the tree that PYTHONPATH names: read sizes from stdin, then run a pack for each further line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = Case(**json.loads(sys.stdin.readline()))
    old = "fovlm.batch" in sys.modules or (Path(os.environ["PYTHONPATH"].split(":")[0]) / "fovlm/batch.py").exists()
    model, packs, collate, Sample = (before if old else after)(case)
    step = (engine_step if case.engine else plain_step)(model.train(), old)
    for n in range(rounds):
        sys.stdin.readline()
        samples = draw(packs[n].tolist(), FRAME, LLM["vocab_size"], Sample)
        begun = time.process_time()
        step(collate(samples))
        print(json.dumps({"samples": len(samples), "seconds": time.process_time() - begun}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a worktree of 3f48945")
    parser.add_argument("--mix", choices=["default", "pictures x8", "one clip"], default="default")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--engine", action="store_true", help="steps of the training engine")
    parser.add_argument("--rounds", type=int, default=4, help="packs of each tree; the first is not counted")
    options = parser.parse_args()
    if options.against is None:
        measure(options.rounds)
        return
    from benchmarks.packing import MIXES, Mix, sizes_of  # of this tree: the other one cannot import it

    # The budgets are those of experiments/ablations.yaml, then (frames, text) and now (data.pack_cost).
    sizes, *packs = {
        "default": lambda: (sizes_of(MIXES["mean 5.7"], 2000).tolist(), (128, 128, 2048), 4096),
        "pictures x8": lambda: (sizes_of(Mix(1, 0.86, 0.14, 8), 2000).tolist(), (16, 128, 2048), 2400),
        "one clip": lambda: ([[8, 8, 128, 0]] * 200, (8, 8, 128), 8 * 32 + 128),
    }[options.mix]()
    case = Case(sizes, *packs, options.size, options.engine)
    here = Path(__file__).resolve().parents[1]
    trees = {}
    for name, tree in (("before", options.against), ("after", here)):
        environment = os.environ | {"PYTHONPATH": f"{tree.resolve()}:{here}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", f"from benchmarks.throughput import measure; measure({options.rounds})"]
        trees[name] = subprocess.Popen(
            command, env=environment, cwd=here / "docs", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        print(json.dumps(asdict(case)), file=trees[name].stdin, flush=True)
    rounds: dict[str, list[tuple[int, float]]] = {name: [] for name in trees}
    for n in range(options.rounds):
        for name, process in trees.items():
            assert process.stdin
            assert process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            print(f"{name}: {found['samples']} samples in {found['seconds']:.1f} CPU-s", flush=True)
            if n:
                rounds[name].append((found["samples"], found["seconds"]))
    rates = {name: sum(n for n, _ in found) / sum(s for _, s in found) for name, found in rounds.items()}
    for name, found in rounds.items():
        print(f"{name}: {rates[name]:.3f} samples per CPU-second ({', '.join(f'{n / s:.3f}' for n, s in found)})")
    print(f"ratio: {rates['after'] / rates['before']:.2f}")


if __name__ == "__main__":
    main()
