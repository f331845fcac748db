"""Engine.step against a plain PyTorch loop: python -m benchmarks.engine_step [--rounds 4] [--packs 1]

SmolLM2-135M with DINOv2-small from random weights, one rank on a CPU, one thread, fp32: the same model, pack and fused
AdamW with clipping on both sides, in turns. Prints the CPU seconds of this process per step, and the ratio.
"""

import argparse
import os
import socket
import statistics
import time

import torch

from benchmarks.memory import experiment, pack
from fovlm.config.deepspeed import resolve
from fovlm.estimate.shapes import geometry


def main() -> None:
    """Print the table."""
    from fovlm.model.build import build
    from fovlm.train import engine
    from fovlm.train.losses import text_loss, text_weight

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="135M fp32", help="a case of benchmarks/memory.py")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--packs", type=int, default=1, help="per step")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    device = engine.start()
    e = experiment(options.case)
    config = resolve(e, 1, "cpu") | {"gradient_accumulation_steps": options.packs}
    shapes = geometry(e.model)
    torch.manual_seed(0)
    ours = engine.Engine(build(e.model), e.optim, config, device)
    model = build(e.model)
    rates = {"connector": e.optim.lr_connector, "encoder": e.optim.lr_encoder, "llm": e.optim.lr_llm}
    groups = [{"params": parameters, "lr": rates[name]} for name, parameters in model.groups().items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=e.optim.weight_decay, fused=True)
    batches = [pack(e, shapes.llm.V, shapes.T) for _ in range(options.packs)]

    def plain() -> None:
        total = float(sum(text_weight(batch) for batch in batches))
        for batch in batches:
            (text_loss(model(batch), batch).total / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    sides = {"engine": lambda: ours.step(batches), "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(options.rounds + 1):
        for name, step in sides.items():
            began = time.process_time()
            step()
            if n:  # the first round allocates
                seconds[name].append(time.process_time() - began)
    for name, values in seconds.items():
        print(f"{name:<8} {statistics.median(values):7.2f} CPU s per step   {' '.join(f'{v:.2f}' for v in values)}")
    print(f"plain / engine {statistics.median(seconds['plain']) / statistics.median(seconds['engine']):.3f}")


if __name__ == "__main__":
    main()
