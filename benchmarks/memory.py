"""Bytes of a training step, measured, beside what `fovlm/estimate/memory.py` says: python -m benchmarks.memory

Every case runs in a process of its own, on one rank and a CPU: the real engine, random weights, two steps of two packs.
A dispatch mode adds up the bytes of all live tensors and keeps the highest sum. That is the memory of tensors, on any
device; what a kernel allocates inside itself and what an allocator rounds up is not in it. On a CPU host and device are
one, so an estimate's two sums are added. Writes benchmarks/results/memory.csv.
"""

import csv
import gc
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.samples import DINO_SMALL, LLM_135M, draw
from fovlm.config.deepspeed import resolve
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, OptimSettings, TrainSettings
from fovlm.data.packing import Batch, Sample, collate
from fovlm.estimate.memory import estimate
from fovlm.estimate.shapes import geometry

RESULTS = Path(__file__).parent / "results" / "memory.csv"
SMALL_LLM = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_DINO = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "mlp_ratio": 4,
    "image_size": 112, "patch_size": 14,
}  # fmt: skip
SMALL: dict[str, Any] = {"llm": SMALL_LLM, "encoder": SMALL_DINO, "frame_size": 112}
REAL: dict[str, Any] = {"llm": LLM_135M, "encoder": DINO_SMALL, "frame_size": 224}
CHECKPOINT = {"grad_checkpoint": ["encoder", "llm"]}

# name -> model, (F, S), engine, precision, frozen backbones
CASES: dict[str, tuple[dict[str, Any], tuple[int, int], str, str, tuple[str, ...]]] = {
    "small fp32": (SMALL, (32, 512), "zero2", "fp32", ()),
    "small bf16": (SMALL, (32, 512), "zero2", "bf16", ()),
    "small bf16 checkpointed": (SMALL | CHECKPOINT, (32, 512), "zero2", "bf16", ()),
    "small bf16 offload": (SMALL, (32, 512), "zero2_offload", "bf16", ()),
    "small bf16 offload checkpointed": (SMALL | CHECKPOINT, (32, 512), "zero2_offload", "bf16", ()),
    "small fp32 offload": (SMALL, (32, 512), "zero2_offload", "fp32", ()),
    "small bf16 zero1": (SMALL, (32, 512), "zero1", "bf16", ()),
    "small bf16 zero3": (SMALL, (32, 512), "zero3", "bf16", ()),
    "small bf16 long text": (SMALL, (8, 2048), "zero2", "bf16", ()),
    "small fp32 long text": (SMALL, (8, 2048), "zero2", "fp32", ()),
    "small fp32 long text checkpointed": (SMALL | CHECKPOINT, (8, 2048), "zero2", "fp32", ()),
    "small bf16 frozen dino": (SMALL, (32, 512), "zero2", "bf16", ("encoder",)),
    "small fp32 frozen": (SMALL, (32, 512), "zero2", "fp32", ("encoder", "llm")),
    "small fp32 multi_token": (SMALL | {"visual": "multi_token"}, (32, 512), "zero2", "fp32", ()),
    "small bf16 coarse": (SMALL | {"visual": "coarse"}, (32, 512), "zero2", "bf16", ()),
    "small bf16 shallow": (SMALL | {"deep_query": False}, (32, 512), "zero2", "bf16", ()),
    "small fp32 before": (SMALL | {"question": "before_frames"}, (32, 512), "zero2", "fp32", ()),
    "135M fp32": (REAL, (8, 512), "zero2", "fp32", ()),
    "135M bf16": (REAL, (8, 512), "zero2", "bf16", ()),
    "135M bf16 offload checkpointed": (REAL | CHECKPOINT, (16, 512), "zero2_offload", "bf16", ()),
}


class Live(TorchDispatchMode):
    """Bytes of all live tensors made inside: `now`, and `peak` since the last reset."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def leave_out(self, *tensors: torch.Tensor | None) -> None:
        """Count none of these, which stay alive."""
        self.sizes |= {t.untyped_storage()._cdata: 0 for t in tensors if t is not None}

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes or storage.device.type == "meta":
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def experiment(name: str) -> Experiment:
    model, (frames, text), engine, precision, frozen = CASES[name]
    return Experiment(
        name="memory",
        deepspeed=engine,
        model=ModelSettings(**model, tokenizer="none"),
        data=DataSettings(
            sources={"a": DataSource(shards="a.tar", kind="video")},
            mixture={"a": 1.0},
            pack_cost=frames + text,
            frame_cost=1,
            max_frames=frames,
            max_tokens=text,
        ),
        optim=OptimSettings(freeze=list(frozen)),
        train=TrainSettings(steps=2, packs_per_step=2, precision=precision, best="train_loss"),  # type: ignore[arg-type]
    )


def pack(e: Experiment, vocabulary: int, tokens_per_look: int) -> Batch:
    """One video that fills the budget."""
    F, S, size = e.data.max_frames, e.data.max_tokens, e.model.frame_size
    ahead = S // 2 if e.model.question == "before_frames" else 0
    return collate(draw([(F, F, S, ahead)], size, vocabulary, Sample), size, tokens_per_look)


def measure(name: str) -> dict[str, Any]:
    """One case in this process: bytes that stay after a step, and the peak of the second one."""
    from fovlm.model import build
    from fovlm.train import engine  # deepspeed is slow to import: not in the process that only starts the others

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(alone)
    e = experiment(name)
    device = engine.start()
    config = resolve(e, 1, "cpu")
    config["zero_optimization"]["reduce_bucket_size"] = 2_000_000  # in proportion to the small models
    shapes = geometry(e.model)
    said = estimate(e, shapes, config, 1, (e.data.max_frames, e.data.max_tokens))
    live = Live()
    with live:
        torch.manual_seed(0)
        net = build.build(e.model)
        net.freeze(e.optim.freeze)
        trainer = engine.Engine(net, e.optim, config, device)
        batches = [pack(e, shapes.llm.V, shapes.T) for _ in range(2)]
        trainer.step(batches)
        gc.collect()
        stays, live.peak = live.now, live.now
        trainer.step(batches)
    # The fp32 gradients of ZeRO-3, and of ZeRO-1 and 2 on the device, are never given back.
    stage = config["zero_optimization"]["stage"]
    grown = 0 if said.host else said.gradients if stage == 3 else said.gradients * 4 // (4 + trainer.dtype.itemsize)
    static = said.weights + said.optimizer + said.host + grown
    return {
        "case": name,
        "stays_mb": round(stays / 1e6, 1),
        "peak_mb": round(live.peak / 1e6, 1),
        "estimated_stays_mb": round(static / 1e6, 1),
        "estimated_peak_mb": round((said.device + said.host) / 1e6, 1),
        "stays_ratio": round(static / stays, 3),
        "peak_ratio": round((said.device + said.host) / live.peak, 3),
        "moving_ratio": round((said.device + said.host - static) / (live.peak - stays), 3),
    }


def main() -> None:
    """All cases, or those named on the command line."""
    if sys.argv[1:2] == ["--one"]:
        row = measure(sys.argv[2])
        print("row", *row.values(), sep="\t")
        return
    rows = []
    for name in sys.argv[1:] or CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("row\t")]
        if not found:
            sys.exit(f"{name}: {done.stderr.strip()[-2000:]}")
        print(*found[0], sep="  ", flush=True)
        rows.append(found[0])
    if sys.argv[1:]:
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    head = [
        "case", "stays_mb", "peak_mb", "estimated_stays_mb", "estimated_peak_mb",
        "stays_ratio", "peak_ratio", "moving_ratio",
    ]  # fmt: skip
    with open(RESULTS, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


if __name__ == "__main__":
    main()
