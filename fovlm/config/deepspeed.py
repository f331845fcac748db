"""An experiment and a file of `ds_configs/` become the one dictionary that DeepSpeed gets. No torch, no deepspeed.

The file says how to run (stage, buckets, offload, precision), the experiment everything else. DeepSpeed itself takes a
misspelt top-level key in silence and clips at 1.0 unless told, so keys are checked here, and clipping is always said.
"""

import json
from pathlib import Path
from typing import Any

from fovlm.config.schema import Experiment
from fovlm.errors import UserError, did_you_mean
from fovlm.paths import ROOT

FOLDER = ROOT / "ds_configs"

# Every key that a file may hold, and the type of its value.
ALLOWED: dict[str, Any] = {
    "bf16": {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool},
    "data_types": {"grad_accum_dtype": str},
    "communication_data_type": str,
    "prescale_gradients": bool,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_optimization": {
        "stage": int,
        "contiguous_gradients": bool,
        "overlap_comm": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": int,
        "allgather_partitions": bool,
        "allgather_bucket_size": int,
        "round_robin_gradients": bool,
        "sub_group_size": int,
        "offload_optimizer": {"device": str, "nvme_path": str, "buffer_count": int, "pin_memory": bool, "ratio": float},
        "offload_param": {"device": str, "nvme_path": str, "buffer_count": int, "buffer_size": int, "pin_memory": bool},
        "stage3_prefetch_bucket_size": int,
        "stage3_param_persistence_threshold": int,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_gather_16bit_weights_on_model_save": bool,
    },
}

# What the experiment decides: a key of DeepSpeed -> the key of the experiment.
OWNED = {
    "train_batch_size": "train.packs_per_step",
    "train_micro_batch_size_per_gpu": "train.packs_per_step",
    "gradient_accumulation_steps": "train.packs_per_step",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "train.precision (auto, bf16 or fp32)",
}


def resolve(experiment: Experiment, world_size: int, device: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The dictionary for DeepSpeed, from the experiment and the file it names. See `merge`."""
    return merge(experiment, read(experiment.deepspeed, folder), world_size, device)


def read(engine: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The JSON file of an engine. Raises UserError when there is none, or it is not a JSON object."""
    file = folder / f"{engine}.json"
    if not file.is_file():
        there = sorted(f.stem for f in folder.glob("*.json"))
        raise UserError(
            f"deepspeed: no file ds_configs/{engine}.json{did_you_mean(engine, there)}; there are {', '.join(there)}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except ValueError as error:
        raise UserError(f"ds_configs/{engine}.json: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"ds_configs/{engine}.json: must be a JSON object")
    return content


def merge(experiment: Experiment, ds_json: dict[str, Any], world_size: int, device: str) -> dict[str, Any]:
    """`ds_json` completed by what the experiment decides; `device` is "cuda" or "cpu".

    One micro batch is one pack, so the global batch of `packs_per_step` is accumulated over packs_per_step / world
    micro steps. Raises UserError for unknown keys, "auto", keys that belong to the experiment, and a world size that
    does not divide the batch.
    """
    _check(ds_json, ALLOWED, f"ds_configs/{experiment.deepspeed}.json: ")
    for path in (("zero_optimization", "stage"), ("bf16", "enabled")):
        if path[1] not in ds_json.get(path[0], {}):
            raise UserError(f"ds_configs/{experiment.deepspeed}.json: {'.'.join(path)}: is missing")
    packs = experiment.train.packs_per_step
    if world_size < 1 or packs % world_size:
        raise UserError(
            f"train.packs_per_step={packs} packs cannot be shared evenly by {world_size} ranks: "
            f"make it a multiple, e.g. train.packs_per_step={max(1, round(packs / world_size)) * world_size}"
        )
    merged: dict[str, Any] = json.loads(json.dumps(ds_json))
    precision = experiment.train.precision
    if precision == "auto":
        precision = "bf16" if merged["bf16"]["enabled"] and device != "cpu" else "fp32"
    merged["bf16"]["enabled"] = precision == "bf16"
    merged.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    if device == "cpu":
        # There are no streams to overlap with and no pinned memory.
        merged["zero_optimization"]["overlap_comm"] = False
        for part in ("offload_optimizer", "offload_param"):
            if part in merged["zero_optimization"]:
                merged["zero_optimization"][part]["pin_memory"] = False
    merged["train_micro_batch_size_per_gpu"] = 1
    merged["gradient_accumulation_steps"] = packs // world_size
    merged["gradient_clipping"] = experiment.optim.clip
    return merged


def _check(content: dict[str, Any], allowed: dict[str, Any], where: str) -> None:
    for key, value in content.items():
        if key in OWNED and key not in allowed:
            raise UserError(f"{where}{key}: belongs to the experiment: {OWNED[key]}")
        if key not in allowed:
            raise UserError(f"{where}{key}: unknown key{did_you_mean(key, allowed)}")
        if value == "auto":
            raise UserError(f"{where}{key}: 'auto' means nothing here: write a value")
        kind = allowed[key]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise UserError(f"{where}{key}: must be an object")
            _check(value, kind, f"{where}{key}.")
        elif not (type(value) is kind or (kind is float and type(value) is int)):
            raise UserError(f"{where}{key}: must be a {kind.__name__}, not {value!r}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise ValueError(f"'{twice}' stands there twice")
    return content
