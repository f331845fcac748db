"""An experiment and a file of `ds_configs/` become the dictionary that DeepSpeed gets. No torch, no deepspeed.

The file says how to run (ZeRO stage, buckets, offload, precision), the experiment everything else. DeepSpeed accepts a
misspelt top-level key without a word and clips at 1.0 by default, so every key is checked here and clipping is always
given.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fovlm.config.messages import explain, key_types, path_of
from fovlm.config.schema import Experiment, Strict
from fovlm.errors import UserError, did_you_mean
from fovlm.paths import ROOT, SHIPPED

FOLDER = ROOT / "ds_configs"
UNSET: Any = None  # a key that is not given keeps DeepSpeed's default

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
INSTEAD = {key: f"belongs to the experiment: {owner}" for key, owner in OWNED.items()}


class Bf16(Strict):
    enabled: bool


class DataTypes(Strict):
    grad_accum_dtype: str = UNSET


class Offload(Strict):
    device: str = UNSET
    nvme_path: str = UNSET
    buffer_count: int = UNSET
    pin_memory: bool = UNSET


class OffloadOptimizer(Offload):
    ratio: float = UNSET


class OffloadParam(Offload):
    buffer_size: int = UNSET


class ZeroOptimization(Strict):
    stage: int
    contiguous_gradients: bool = UNSET
    overlap_comm: bool = UNSET
    reduce_scatter: bool = UNSET
    reduce_bucket_size: int = UNSET
    allgather_bucket_size: int = UNSET
    sub_group_size: int = UNSET
    offload_optimizer: OffloadOptimizer = UNSET
    offload_param: OffloadParam = UNSET
    stage3_prefetch_bucket_size: int = UNSET
    stage3_param_persistence_threshold: int = UNSET
    stage3_max_live_parameters: int = UNSET
    stage3_max_reuse_distance: int = UNSET
    stage3_gather_16bit_weights_on_model_save: bool = UNSET


class DeepSpeedFile(Strict):
    """What a file of `ds_configs/` may hold."""

    bf16: Bf16
    zero_optimization: ZeroOptimization
    data_types: DataTypes = UNSET
    communication_data_type: str = UNSET
    wall_clock_breakdown: bool = UNSET
    memory_breakdown: bool = UNSET
    zero_force_ds_cpu_optimizer: bool = UNSET


def resolve(experiment: Experiment, world_size: int, device: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The dictionary for DeepSpeed, from the experiment and the file it names. See `merge`."""
    return merge(experiment, read(experiment.deepspeed, folder), world_size, device)


def read(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The content of `ds_configs/NAME.json`. Raises UserError when there is no such file, or it is not JSON."""
    files = {file.stem: file for place in (SHIPPED / FOLDER.name, folder) for file in place.glob("*.json")}
    if (file := files.get(name)) is None:
        there = sorted(files)
        raise UserError(
            f"deepspeed: no file ds_configs/{name}.json{did_you_mean(name, there)}; there are {', '.join(there)}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"ds_configs/{name}.json: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"ds_configs/{name}.json: must be a JSON object")
    return content


def merge(experiment: Experiment, ds_json: dict[str, Any], world_size: int, device: str) -> dict[str, Any]:
    """`ds_json` completed by what the experiment decides; `device` is "cuda" or "cpu".

    One micro batch is one pack: the global batch of `packs_per_step` is accumulated over packs_per_step / world micro
    steps, rounded up. Raises UserError for unknown keys, wrong types, "auto", and keys that belong to the experiment.
    """
    merged = _checked(ds_json, experiment.deepspeed)
    if experiment.model.compile and merged["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"model.compile=true: not with ZeRO-3 (deepspeed: {experiment.deepspeed}), which gathers "
            "weights inside the layers: take zero2, or leave model.compile out"
        )
    precision = experiment.train.precision
    if precision == "auto":  # of a run from before `fovlm/model/precision.py`, which replaces it
        precision = "bf16" if merged["bf16"]["enabled"] and device != "cpu" else "fp32"
    merged["bf16"]["enabled"] = precision == "bf16"
    merged.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    if merged["zero_optimization"]["stage"] == 1 and precision == "bf16":
        # `fovlm/train/gradients.py` adds up in fp32; with "fp32" here DeepSpeed would take another optimizer.
        merged["data_types"]["grad_accum_dtype"] = "bf16"
    if device == "cpu":
        # There are no streams to overlap with and no pinned memory.
        merged["zero_optimization"]["overlap_comm"] = False
        for part in ("offload_optimizer", "offload_param"):
            if part in merged["zero_optimization"]:
                merged["zero_optimization"][part]["pin_memory"] = False
    merged["timers"] = {"throughput": {"enabled": False}}  # it waits for the GPU twice per micro-step
    merged["train_micro_batch_size_per_gpu"] = 1
    merged["gradient_accumulation_steps"] = -(-experiment.train.packs_per_step // world_size)
    merged["gradient_clipping"] = experiment.optim.clip
    return merged


def _checked(ds_json: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of a file's content. Raises UserError for its first mistake: unknown keys, then values, then gaps."""
    try:
        return DeepSpeedFile.model_validate(ds_json).model_dump(exclude_unset=True)
    except ValidationError as error:
        order = {"extra_forbidden": 0, "missing": 2}
        first = min(error.errors(include_url=False), key=lambda one: order.get(one["type"], 1))
        path = path_of(first, ds_json)
        if first["input"] == "auto":
            message = "'auto' is not supported: write a value"
        else:
            message = explain(first, path, key_types(DeepSpeedFile), INSTEAD)
        raise UserError(f"ds_configs/{name}.json: {'.'.join(path)}: {message}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise ValueError(f"'{twice}' is given twice")
    return content
