"""Writes model.safetensors one tensor at a time, in several files when it is large, as Hugging Face names them.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length, a JSON header with
type, shape and place of every tensor, and the tensors' bytes, without gaps. The library's own `save_file` wants all
tensors of a file in memory; this one holds one.
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

Plan = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, type


def byte_size(text: str) -> int:
    """Bytes of "4GB", "500MB", "2GiB". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise UserError(f"'{text}' is no size: write it like 4GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def write_tensors(
    folder: Path, plan: Plan, read: Callable[[str], Tensor], largest: int, done: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Write the tensors of `plan` into model.safetensors, or several files of at most `largest` bytes and their index.

    `read(name)` is called once for each, in the order of the plan; `done(bytes)` after each. A tensor larger than
    `largest` gets a file of its own.
    """
    files: list[list[str]] = [[]]
    room = largest
    for name in plan:
        if files[-1] and _bytes(plan[name]) > room:
            files.append([])
            room = largest
        files[-1].append(name)
        room -= _bytes(plan[name])
    n = len(files)
    ends = [f"-{i:05d}-of-{n:05d}" if n > 1 else "" for i in range(1, n + 1)]
    paths = [folder / f"model{end}.safetensors" for end in ends]
    for path, names in zip(paths, files, strict=True):
        _write(path, {name: plan[name] for name in names}, read, done)
    if n > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, plan.values()))},
            "weight_map": {name: path.name for path, names in zip(paths, files, strict=True) for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return paths


def _write(path: Path, plan: Plan, read: Callable[[str], Tensor], done: Callable[[int], None]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in plan.items():
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [at, at + _bytes(plan[name])]}
        at += _bytes(plan[name])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in plan.items():
            tensor = read(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} where {shape} was announced")
            file.write(tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
            done(_bytes(plan[name]))


def _bytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    shape, dtype = entry
    return math.prod(shape) * dtype.itemsize
