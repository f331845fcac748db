"""Kernels that a training step launches, and host waits in it, by phase: python -m benchmarks.launches [--check]

The real engine on one rank and a CPU, in bf16, on narrow models with the layers of SmolLM2-135M and DINOv2-small: the
number of launches does not depend on widths. An operator counts as a launch unless it only makes a view or allocates,
and as a wait when it gives a value to the host. A fused optimizer and one call of attention over all samples count as
one each.

Compiled, a graph counts as the kernels that Inductor makes of it: its scheduler fuses the graph as for Triton on a GPU,
and what is left are fused kernels and calls of libraries (`kernels_of`). Nothing is generated or run of them; the graph
runs eagerly, uncounted. Autotuning and what a driver launches inside one call are not in it.

`--check` exits with 1 above the aims: compiled 1,500 a micro-step, 300 an optimizer step, no wait in a micro-step.
"""

import argparse
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput, ReinterpretView
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from benchmarks.memory import pack
from fovlm.config.deepspeed import resolve
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, TrainSettings
from fovlm.estimate.shapes import geometry
from fovlm.model import attention

LLM = {"hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 9,
       "num_key_value_heads": 3, "vocab_size": 128, "tie_word_embeddings": True}  # fmt: skip
ENCODER = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
ALLOCATIONS = ("empty", "detach", "alias", "lift_fresh", "set_", "resize_", "record_stream")
MICRO_STEPS = 2
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


AIMS = {"micro-step": 1500, "optimizer step": 300}


class Count(TorchDispatchMode):
    """Counts launches and waits by `phase`."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled functions stay compiled under it."""
        return True

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

    def graph(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """For Inductor: run a graph, counting its kernels in place of its operators."""
        kernels = kernels_of(module, inputs)

        def run(*args: Any) -> Any:
            self.launches[self.phase] += kernels
            before, self.phase = self.phase, "inside graphs"
            try:
                return module(*args)
            finally:
                self.phase = before

        return make_boxed_func(run)

    def during(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with what it launches counted as `phase`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return call(*args, **kwargs)
            finally:
                self.phase = before

        return counted


class NoDriver:
    """What Inductor asks Triton's driver about a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def kernels_of(module: torch.fx.GraphModule, inputs: list[Any]) -> int:
    """How many kernels and library calls Inductor makes of a graph, by its scheduler for Triton."""
    fake = detect_fake_mode(inputs)
    graph = GraphLowering(module, example_inputs=inputs, shape_env=fake.shape_env)
    with V.set_graph_handler(graph), V.set_fake_mode(fake), DebugContext(), inductor.patch(cpu_backend="triton"):
        graph.run(*inputs)
        graph._update_scheduler()
        nodes = [node for node in graph.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        return sum(not (node.node and isinstance(node.node, (MultiOutput, ReinterpretView))) for node in nodes)


@torch.library.custom_op("fovlm_benchmarks::attention", mutates_args=())
def whole(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Attention of all samples of a pack [M, heads, d] in one operator, as on CUDA. Its values do not matter here."""
    return query * scale


@torch.library.custom_op("fovlm_benchmarks::attention_backward", mutates_args=())
def whole_backward(slope: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(query), torch.ones_like(key), torch.ones_like(value)


whole.register_fake(lambda query, key, value, bounds, scale: torch.empty_like(query))
whole_backward.register_fake(lambda slope, *inputs: tuple(torch.empty_like(x) for x in inputs))
whole.register_autograd(
    lambda ctx, slope: (*whole_backward(slope, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
)


def measure(zero: str, compiled: bool) -> Count:
    """The launches and waits of two micro-steps and an optimizer step."""
    from fovlm.model.build import build
    from fovlm.train import engine

    device = engine.start()
    e = Experiment(
        name="launches",
        deepspeed=zero,
        model=ModelSettings(llm=LLM, encoder=ENCODER, tokenizer="none", frame_size=56, query_dim=48),
        data=DataSettings(sources={"a": DataSource(shards="a.tar", kind="video")}, mixture={"a": 1.0},
                          pack_cost=72, frame_cost=1, max_frames=8, max_tokens=64),
        train=TrainSettings(steps=2, packs_per_step=MICRO_STEPS, precision="bf16", best="train_loss"),
    )  # fmt: skip
    shapes, count = geometry(e.model), Count()
    torch.manual_seed(0)
    model = build(e.model)
    if compiled:
        model.compile_layers(
            backend=aot_autograd(
                fw_compiler=count.graph,
                bw_compiler=count.graph,
                decompositions=select_decomp_table(),
                partition_fn=min_cut_rematerialization_partition,
            )
        )
    trained = engine.Engine(model, e.optim, resolve(e, 1, "cpu"), device)
    batches = [pack(e, shapes.llm.V, shapes.T) for _ in range(MICRO_STEPS)]
    trained.step(batches)()  # DeepSpeed and the optimizer allocate, graphs are compiled
    count.launches.clear()
    trained._loss = count.during("forward", trained._loss)  # type: ignore[method-assign]
    trained._weight = count.during("host", trained._weight)  # type: ignore[method-assign]
    trained.deepspeed.backward = count.during("backward", trained.deepspeed.backward)
    with count:
        trained.step(batches)
    return count


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--zero", choices=["zero1", "zero2"], default="zero2", help="of ds_configs/")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    triton.runtime.driver.set_active(NoDriver())
    attention.varlen_runs = lambda device, dtype: True
    attention._varlen = lambda query, key, value, bounds, longest, scale: whole(query, key, value, bounds, scale)
    missed = False
    print(f"{options.zero:<26}{'launches':>10}{'waits':>8}")
    for mode in ("eager", "compiled"):
        count = measure(options.zero, mode == "compiled")
        totals: Counter[str] = Counter()
        for phase in ("forward", "backward", "optimizer step"):
            per = 1 if phase == "optimizer step" else MICRO_STEPS
            launches, waits = count.launches[phase] / per, count.waits[phase] / per
            print(f"{mode + ', ' + phase:<26}{launches:10.0f}{waits:8.1f}")
            totals["optimizer step" if per == 1 else "micro-step"] += round(launches)
            missed |= per > 1 and waits > 0
        missed |= mode == "compiled" and any(totals[name] > aim for name, aim in AIMS.items())
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
