"""Checkpoints in the layout of DeepSpeed 0.19.8's ZeRO files, made without it (real ones: train/test_engine.py)."""

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from fovlm.checkpoint import store
from fovlm.checkpoint.reference import ReferenceBatch
from fovlm.checkpoint.store import Checkpoints, State
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, TrainSettings
from fovlm.model.modeling import FoveatedVLM
from helpers import tiny
from helpers.models import FRAME, pack, sample

SAMPLES = [sample("video", 3), sample("text", text=8), sample("image", 1, 4, prompt=3)]


def write_shards(folder: Path, model: nn.Module, stage: int, world: int, dtype: torch.dtype) -> None:
    """What `world` ranks write of a model in training: fp32 masters of its trained parameters, the rest in `dtype`."""
    folder.mkdir(parents=True)
    trained: list[dict[str, Tensor]] = [{}, {}]  # two groups, the connector first, as an optimizer would order them
    frozen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained["connector" not in name][name] = parameter.detach()
        else:
            frozen[name] = parameter.detach().to(dtype)
    trained = [group for group in trained if group]
    state = model.state_dict()
    first: dict[int, str] = {}
    ties = {}
    for name, value in state.items():
        if value.data_ptr() in first:
            ties[name] = first[value.data_ptr()]
        first.setdefault(value.data_ptr(), name)
    buffers = [name for name, _ in model.named_buffers()]
    for rank in range(world):
        pieces = [{name: part(value, rank, world) for name, value in group.items()} for group in trained]
        if stage == 3:
            flat = [torch.cat(list(group.values())) for group in pieces]
            key, value = "fp32_flat_groups", [torch.cat(flat)[:100], torch.cat(flat)[100:]]  # cut anywhere
        else:
            key = "single_partition_of_fp32_groups"
            value = [part(torch.cat([p.flatten() for p in group.values()]), rank, world, 2) for group in trained]
        moments = [{"exp_avg": torch.full_like(v, 7.0)} for v in value]
        optimizer = {"zero_stage": stage, "partition_count": world, key: value, "base_optimizer_state": moments}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        bf16 = "bf16_" if dtype == torch.bfloat16 else ""
        torch.save({"optimizer_state_dict": optimizer}, folder / f"{bf16}{name}_optim_states.pt")
        if stage < 3 and rank:
            continue
        listed = frozen if stage > 1 else {}  # as DeepSpeed does it: in stage 1 they are in "module" alone
        torch.save(
            {
                "module": {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()},
                "buffer_names": buffers,
                "param_shapes": [{k: v.shape for k, v in group.items()} for group in trained],
                "shared_params": ties,
                "frozen_param_shapes": {k: v.shape for k, v in listed.items()},
                "frozen_param_fragments": {k: part(v, rank, world) if stage == 3 else v for k, v in listed.items()},
            },
            folder / (f"{name}_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"),
        )


def part(value: Tensor, rank: int, world: int, align: int = 1) -> Tensor:
    """Rank r's part of a tensor, flat and padded to W equal parts."""
    n = math.ceil(value.numel() / (world * align)) * align
    padded = torch.cat([value.flatten(), torch.zeros(n * world - value.numel(), dtype=value.dtype)])
    return padded[rank * n : (rank + 1) * n].clone()


def experiment(model: FoveatedVLM, tokenizer: Path, name: str = "tiny") -> Experiment:
    config = model.config
    return Experiment(
        name=name,
        note="a test",
        model=ModelSettings(
            llm=config.llm_config.to_diff_dict(),
            encoder=config.encoder_config.to_diff_dict(),
            tokenizer=str(tokenizer),
            visual=config.visual,
            query_dim=config.query_dim,
            frame_size=FRAME,
        ),
        data=DataSettings(sources={"clips": DataSource(shards="clips.tar", kind="video")}, mixture={"clips": 1.0}),
        train=TrainSettings(steps=5, best="train_loss"),
    )


def write_run(
    run: Path,
    model: FoveatedVLM,
    stage: int = 2,
    world: int = 2,
    dtype: torch.dtype = torch.float32,
    step: int = 5,
    reference: bool = True,
    best: bool = False,
) -> Path:
    """A run folder with one checkpoint more; returns the checkpoint."""
    tiny.tokenizer().save_pretrained(run / "tokenizer")
    checkpoints = Checkpoints(run)
    staging = checkpoints.staging(f"step-{step:08d}")
    write_shards(staging / store.ENGINE, model, stage, world, dtype)
    (staging / "experiment.yaml").write_text(experiment(model, run / "tokenizer").dump())
    (staging / store.CONFIG).write_text(model.config.to_json_string(use_diff=False))
    if reference:
        batch = pack(SAMPLES)
        with torch.no_grad():
            nll = copy.deepcopy(model).to(dtype)(batch)
        ReferenceBatch(SAMPLES, batch).outputs(nll, dtype).save(staging)
    state = State(step=step, samples=90, tokens=1234, world_size=world, zero_stage=stage, metric=1.5)
    return seal(checkpoints, staging, state, best)


def seal(checkpoints: Checkpoints, staging: Path, state: State, best: bool = False) -> Path:
    files = sorted(p for p in staging.rglob("*") if p.is_file())
    return checkpoints.publish(staging, store.seal(files, staging), state, best)


def reseal(path: Path) -> None:
    """Give a checkpoint whose files were changed a manifest that agrees with them."""
    (path / store.MANIFEST).unlink()
    staging = path.rename(path.with_name(f".staging-{path.name}"))
    state = store.read_state(staging)
    (staging / store.STATE).unlink()
    seal(Checkpoints(path.parent.parent), staging, state)
