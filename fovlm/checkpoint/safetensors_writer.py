"""Write model.safetensors one tensor at a time, split into several files when it is large, as Hugging Face names them.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length, a JSON header with
type, shape and offsets of every tensor, then the tensors' bytes without gaps. The library's `save_file` needs all
tensors of a file in memory; this writer holds one.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fovlm.errors import UserError

TYPES = {
    **{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

WeightPlan = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, type


def byte_size(text: str) -> int:
    """Bytes of "4GB", "500MB", "2GiB". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"'{text}' is no size: write it like 4GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def write_tensors(
    folder: Path,
    plan: WeightPlan,
    read: Callable[[str], Tensor],
    largest: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the tensors of `plan` to model.safetensors, or to several files of at most `largest` bytes and an index.

    `read(name)` is called once per tensor, in order; `on_progress(done, total)` in bytes after each. A tensor larger
    than `largest` gets its own file.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in plan.items()}
    total, done = sum(sizes.values()), 0
    files: list[list[str]] = [[]]
    for name in plan:
        if files[-1] and sum(sizes[other] for other in files[-1]) + sizes[name] > largest:
            files.append([])
        files[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        part = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / f"model{part}.safetensors"
        weight_map |= dict.fromkeys(names, path.name)
        with path.open("wb") as file:
            file.write(_header({name: plan[name] for name in names}, sizes))
            for name in names:
                file.write(read(name).to(plan[name][1]).contiguous().flatten().view(torch.uint8).numpy().data)
                done += sizes[name]
                on_progress(done, total)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _header(plan: WeightPlan, sizes: dict[str, int]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in plan.items():
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text
