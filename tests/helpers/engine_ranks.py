"""What each rank does for test_engine.py: many checks in one start. Writes what it found.

python -m helpers.engine_ranks FOLDER [OTHER]     OTHER: the folder of a run on another number of ranks, to go on from
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.locate import load_weights
from fovlm.checkpoint.reference import ReferenceBatch
from fovlm.checkpoint.universal import universal_for
from fovlm.config.schema import OptimSettings
from fovlm.data.packing import Batch
from fovlm.errors import UserError
from fovlm.train import gradients
from fovlm.train.engine import Engine, start
from helpers.models import pack, sample, tiny_model
from helpers.zero_files import experiment

OPTIM = OptimSettings(lr_connector=1e-3, lr_encoder=5e-4, lr_llm=2e-3, weight_decay=0.0)
BETA = 0.3
# Every pattern of kinds over two ranks, with unequal numbers of tokens: step by step, two packs each.
VIDEO, IMAGE = ("video", 3, 3), ("image", 1, 4)
STEPS = [
    [[VIDEO, ("text", 0, 0)], [("short", 0, 0)]],
    [[("text", 0, 0)], [VIDEO]],
    [[IMAGE], [("text", 0, 0), ("more", 0, 0)]],
    [[IMAGE], [VIDEO, IMAGE]],
    [[("text", 0, 0)], [("short", 0, 0)]],
]


def packs(step: int) -> list[Batch]:
    kinds = STEPS[step % len(STEPS)]
    return [pack([sample(f"{k}{step}", f, n, text=4 + len(k) + i) for i, (k, f, n) in enumerate(one)]) for one in kinds]


def pairs(step: int) -> list[Batch]:
    """Two packs of preferences: two pairs and one, or one and nothing but a text."""
    pair = [sample(f"p{step}", 2, text=5, role="chosen"), sample(f"q{step}", 2, text=7, role="rejected")]
    picture = [sample(f"i{step}", 1, 4, 6, role="chosen"), sample(f"j{step}", 1, 4, 4, role="rejected")]
    words = [sample(f"w{step}", text=4, role="chosen"), sample(f"x{step}", text=6, role="rejected")]
    packs = [[*pair, *words], picture] if step % 2 == 0 else [picture, [sample(f"a{step}", text=5)]]
    return [pack(samples) for samples in packs]


def settings(stage: int, bf16: bool = False, **more: Any) -> dict[str, Any]:
    bucket = {"reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6}
    if stage == 3:
        bucket = {"stage3_prefetch_bucket_size": 10**5, "stage3_param_persistence_threshold": 1000}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 // distributed.world(),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **bucket},
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": bf16},
        **more,
    }


def engine(device: torch.device, stage: int, seed: int = 0, **more: Any) -> Engine:
    return Engine(tiny_model(seed), OPTIM, settings(stage, **more), device)


def run(engine: Engine, first: int, last: int, packs: Callable[[int], list[Batch]] = packs) -> list[dict]:
    mine = slice(distributed.rank(), None, distributed.world())
    return [dataclasses.asdict(engine.step(packs(step)[mine])()) for step in range(first, last)]


def main(arguments: list[str]) -> int:
    device, out = start(), Path(arguments[0])
    gradients.PIECE = 1 << 14  # several of the small models' gradients
    other = Path(arguments[1]) if len(arguments) > 1 else None
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        trained = engine(device, stage)
        first = run(trained, 0, 5)
        checkpoints = store.Checkpoints(out / f"zero{stage}")
        state = store.State(step=5, world_size=distributed.world(), zero_stage=stage)
        settings_of_run = experiment(tiny_model(), out / f"zero{stage}" / "tokenizer").dump()
        probe = ReferenceBatch(
            [sample("probe", 3), sample("words", text=9)], pack([sample("probe", 3), sample("words", text=9)])
        )
        path = trained.save(checkpoints, state, settings_of_run, best=True, probe=probe)
        again = engine(device, stage, seed=1)
        again.load(path)
        found[f"zero{stage}"] = {"first": first, "on": run(trained, 5, 8), "resumed": run(again, 5, 8)}
        if other is None:
            continue
        theirs = store.Checkpoints(other / f"zero{stage}").first_whole(verify=store.verify)
        assert theirs is not None
        try:
            universal = universal_for(theirs, out / f"universal{stage}")
        except UserError as error:
            found[f"zero{stage}"]["refused"] = str(error)
            continue
        moved = engine(device, stage, seed=2, checkpoint={"load_universal": True})
        moved.load(theirs, universal)
        found[f"zero{stage}"]["moved"] = run(moved, 5, 8)
    for stage in (2, 3):
        unusual(device, stage, out / f"unusual{stage}")
    found["bf16"] = {"first": run(engine(device, 2, bf16=True), 0, 5)}
    whole = engine(device, 1, bf16=True, data_types={"grad_accum_dtype": "bf16"})
    found["bf16, zero1"] = {"first": run(whole, 0, 5)}
    twice = engine(device, 2, gradient_accumulation_steps=4 // distributed.world())
    found["accumulated"] = run(twice, 0, 5, lambda step: packs(step) * 2)
    found["not finite, zero1"] = not_finite(engine(device, 1))
    found["not finite"] = not_finite(engine(device, 2))
    offload = settings(2, bf16=True, zero_force_ds_cpu_optimizer=False)
    offload["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    found["not finite, offload"] = not_finite(Engine(tiny_model(), OPTIM, offload, device))
    preferring = Engine(tiny_model(), OPTIM, settings(2), device, reference=tiny_model(), dpo_beta=BETA)
    found["dpo"] = run(preferring, 0, 6, pairs)
    warm = tiny_model(seed=4)
    load_weights(warm, str(out / "zero2"))
    found["warm"] = float(warm(packs(0)[0]).sum().detach())
    if distributed.rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    return 0


def unusual(device: torch.device, stage: int, folder: Path) -> None:
    """Save a model with a frozen backbone and a buffer, in bf16 with its optimizer offloaded; and what it holds."""
    model = tiny_model(seed=6)
    model.freeze(["llm"])
    model.connector.register_buffer("seen", torch.arange(5))
    given = settings(stage, bf16=True, zero_force_ds_cpu_optimizer=False)
    given["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    trained = Engine(model, OPTIM, given, device)
    run(trained, 0, 2)
    trained.save(store.Checkpoints(folder), store.State(step=2, zero_stage=stage), "name: test", best=True)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        if distributed.rank() == 0:
            truth = {name: value.detach().clone() for name, value in model.state_dict().items()}
            save_file(truth, folder / "truth.safetensors")


def not_finite(trained: Engine) -> dict[str, Any]:
    """One rank alone meets a loss that is not finite; all skip the step, and go on."""
    batches = packs(0)[distributed.rank() :: distributed.world()]
    if distributed.rank() == distributed.world() - 1:
        batches[-1] = dataclasses.replace(batches[-1], weight=batches[-1].weight * float("inf"))
    before = [p.detach().clone() for p in trained.model.parameters()]
    step = trained.step(batches)()
    same = all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
    after = run(trained, 0, 1)[0]
    return {"skipped": distributed.gather(step.skipped), "same": distributed.gather(same), "after_frames": after}


if __name__ == "__main__":
    main(sys.argv[1:])
