"""Kernels that a training step launches, and host waits in it, by phase: python -m benchmarks.launches [--check]

The real engine on one rank and a CPU, in bf16 with ZeRO-2, on narrow models with the layers of SmolLM2-135M and
DINOv2-small: the number of launches does not depend on widths. An operator counts as a launch unless it only makes a
view or allocates, and as a wait when it gives a value to the host. Compilation is off. `--check` exits with 1 when a
micro-step waits.
"""

import argparse
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import pack
from fovlm.config.deepspeed import resolve
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, TrainSettings
from fovlm.estimate.shapes import geometry

LLM = {"hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 9,
       "num_key_value_heads": 3, "vocab_size": 128, "tie_word_embeddings": True}  # fmt: skip
ENCODER = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
ALLOCATIONS = ("empty", "detach", "alias", "lift_fresh", "set_", "resize_", "record_stream")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class Count(TorchDispatchMode):
    """Counts launches and waits by `phase`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "optimizer step"
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name.startswith(wait) for wait in WAITS):
            self.waits[self.phase] += 1
        elif not func.is_view and not name.startswith(ALLOCATIONS):
            self.launches[self.phase] += 1
        return func(*args, **(kwargs or {}))

    def during(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with what it launches counted as `phase`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return call(*args, **kwargs)
            finally:
                self.phase = before

        return counted


def main() -> int:
    """Print the table; returns the exit status."""
    from fovlm.model.build import build
    from fovlm.train import engine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device, packs = engine.start(), 2
    e = Experiment(
        name="launches",
        model=ModelSettings(llm=LLM, encoder=ENCODER, tokenizer="none", frame_size=56, query_dim=48),
        data=DataSettings(sources={"a": DataSource(shards="a.tar", kind="video")}, mixture={"a": 1.0},
                          pack_cost=72, frame_cost=1, max_frames=8, max_tokens=64),
        train=TrainSettings(steps=2, packs_per_step=packs, precision="bf16", best="train_loss"),
    )  # fmt: skip
    shapes = geometry(e.model)
    torch.manual_seed(0)
    trained = engine.Engine(build(e.model), e.optim, resolve(e, 1, "cpu"), device)
    batches = [pack(e, shapes.llm.V, shapes.T) for _ in range(packs)]
    trained.step(batches)()  # DeepSpeed and the optimizer allocate
    count = Count()
    trained._loss = count.during("forward", trained._loss)  # type: ignore[method-assign]
    trained._weight = count.during("host", trained._weight)  # type: ignore[method-assign]
    trained.deepspeed.backward = count.during("backward", trained.deepspeed.backward)
    with count:
        trained.step(batches)
    micro_steps = {"forward": packs, "backward": packs}
    print(f"{'phase':<16}{'launches':>10}{'waits':>8}")
    for phase in ("forward", "backward", "optimizer step"):
        per = micro_steps.get(phase, 1)
        print(f"{phase:<16}{count.launches[phase] / per:10.0f}{count.waits[phase] / per:8.1f}")
    return int(options.check and bool(count.waits["forward"] or count.waits["backward"]))


if __name__ == "__main__":
    sys.exit(main())
