"""`python -m kernels.compile`: compile every kernel for GPUs that need not be there, and say what each one costs.

Each operation is called with small tensors, its launches are caught instead of run, and what would have been
compiled at that launch is compiled for each of TARGETS whose shared memory allows it. Per kernel, as CSV: registers and
stack bytes of a thread (a stack means spilled registers), shared memory of a program, the widest load from memory,
instructions and barriers of one pass of the loop over memory, and how many of an SM's warps fit at once (occupancy) by
registers and shared memory. `--narrow` keeps to DINOv2-small in bf16, one look at each frame, trainable.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch

from kernels import absorbed_attention, query_attention
from kernels.absorbed_attention import stages
from kernels.common import group_looks, triton

# By compute capability: KiB of shared memory of one program, of all programs of an SM, and an SM's warps. CUDA C++
# programming guide, technical specifications per compute capability.
TARGETS = {
    80: (163, 164, 64),  # A100
    86: (99, 100, 48),  # RTX 3090, A10
    89: (99, 100, 48),  # RTX 4090, L4, L40S
    90: (227, 228, 64),  # H100
    100: (227, 228, 64),  # B200
    120: (99, 100, 48),  # RTX 5090
}
REGISTERS, PROGRAMS = 65536, {86: 16, 89: 24, 120: 24}  # programs of an SM: 32 elsewhere
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel takes. Bytes, except registers (of a thread) and occupancy (share of an SM's warps)."""

    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    stack: int
    shared: int
    shared_limit: int
    widest_load: int
    loop: int
    barriers: int
    occupancy: float


def catch_launches(kernel, call: Callable[[], object]) -> list[tuple[tuple, dict]]:
    """The arguments of every launch of this kernel during call(), none of which runs."""
    launches: list[tuple[tuple, dict]] = []
    kernel.run = lambda *args, grid, warmup, **kwargs: launches.append((args, kwargs))
    try:
        call()
    finally:
        del kernel.run
    return launches


def compile_launch(kernel, args: tuple, kwargs: dict, capability: int):
    """The kernel as Triton would compile it for this launch on this compute capability (a key of TARGETS)."""
    signature, constants, attrs = {}, {}, {}
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = (
            TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        )
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32), options=options)


def cost(compiled, name: str, case: str, capability: int) -> Cost:
    """Read what the compiled kernel takes from its binary and its PTX."""
    usage, code = _cuobjdump(compiled, "-res-usage"), _cuobjdump(compiled, "-sass")
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = int(registers), int(stack)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    copies = [int(size, 0) for size in re.findall(r"cp\.async\S* \[.*?\], \[.*?\], (\w+)", compiled.asm["ptx"])]
    widest = max([int(lanes or 1) * int(bits) // 8 for lanes, bits in loads] + copies)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    limit, total, most = TARGETS[capability]
    limit, total = 1024 * limit, 1024 * total
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    programs = min(by_registers, most // warps, PROGRAMS.get(capability, 32), total // (shared + 1024))
    loop = _loop(code)
    barriers, occupancy = sum(text.startswith("BAR") for text in loop), programs * warps / most
    target = f"sm_{capability}"
    return Cost(
        name, case, target, warps, registers, stack, shared, limit, widest, len(loop), barriers, occupancy
    )  # fmt: skip


def _cuobjdump(compiled, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _loop(code: str) -> list[str]:
    """The instructions of the shortest loop that reads from global memory; none where everything is unrolled."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?(.*?);", code)
    places, texts = [int(place, 16) for place, _ in found], [text for _, text in found]
    jumps = [(n, re.match(r"BRA.*0x([0-9a-f]+)", text)) for n, text in enumerate(texts)]
    back = [(int(jump[1], 16), n) for n, jump in jumps if jump and int(jump[1], 16) < places[n]]
    loops = [texts[places.index(start) : n + 1] for start, n in back if start in places]
    return min((loop for loop in loops if any(text.startswith("LDG") for text in loop)), key=len, default=[])


def cases(heads: int, looks: int | None, dtype: torch.dtype) -> Iterator[tuple]:
    """(kernel, its name, the call that launches it) for one shape: 2 frames of 257 rows, heads of width 64."""
    frames, rows, width = 2, 257, 64
    count = frames * (looks or 1)
    look_of, first = (None, None) if looks is None else group_looks(torch.arange(count) // looks, frames)
    query, lse = torch.zeros(count, heads, width, dtype=dtype), torch.zeros(count, heads)
    key = torch.zeros(frames, rows, heads, width, dtype=dtype)
    plain, absorbed = query_attention, absorbed_attention
    forward = partial(plain._forward, query, key, key, look_of, first, 0.125)
    yield plain._forward_kernel, "query_forward", forward
    for need in (True, False):
        backward = partial(plain._backward, query, query, key, key, query, lse, look_of, first, 0.125, need)
        yield plain._backward_kernel, f"query_backward{'' if need else '_frozen'}", backward
    if dtype == torch.float32:  # the absorbed form runs in fp32 in tests only
        return
    folded, hidden = torch.zeros(count, heads, heads * width, dtype=dtype), key.flatten(2)
    forward = partial(absorbed._forward, folded, hidden, look_of, first, 0.125)
    yield absorbed._forward_kernel, "absorbed_forward", forward
    # this backward pass launches two kernels: catch one while looking at the other
    for need in (True, False):
        backward = partial(absorbed._backward, folded, folded, hidden, folded, lse, look_of, first, 0.125, need)
        caught = partial(catch_launches, absorbed._rows_kernel, backward)
        yield absorbed._backward_kernel, f"absorbed_backward{'' if need else '_frozen'}", caught
        if need:
            caught = partial(catch_launches, absorbed._backward_kernel, backward)
            yield absorbed._rows_kernel, "absorbed_backward_rows", caught


def main(arguments: list[str] | None = None) -> None:
    """Compile and print; see the module."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__)
    parser.add_argument("--targets", nargs="*", type=int, default=sorted(TARGETS), choices=sorted(TARGETS))
    parser.add_argument("--narrow", action="store_true", help="a few cases only")
    options = parser.parse_args(arguments)
    table = csv.DictWriter(sys.stdout, [field.name for field in fields(Cost)])
    table.writeheader()
    shapes = [(6, torch.bfloat16)] + ([] if options.narrow else [(12, torch.bfloat16), (6, torch.float32)])
    for heads, dtype in shapes:
        for looks in (None,) if options.narrow else (None, 8):
            case = f"H={heads} d=64 N=257 {str(dtype).removeprefix('torch.')} looks={looks or 'one'}"
            for kernel, name, call in cases(heads, looks, dtype):
                if options.narrow and name.endswith("_frozen"):
                    continue
                ((args, kwargs),) = catch_launches(kernel, call)
                for capability in options.targets:
                    if "NEED_X" in kwargs or name == "absorbed_forward":
                        kwargs["num_stages"] = stages(heads * 64, 1024 * TARGETS[capability][0])
                    compiled = compile_launch(kernel, args, kwargs, capability)
                    table.writerow(asdict(cost(compiled, name, case, capability)))


if __name__ == "__main__":
    main()
