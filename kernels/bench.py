"""`python -m kernels.bench [query|hidden] [--shapes small:64 base:512:8]`: check every kernel, then time it.

`query` starts from keys and values in memory: the kernel, the eager reference, every backend of
scaled_dot_product_attention that takes the shape, compiled flex_attention with its kernel for long queries and the one
for decoding (on a GPU). `hidden` starts from the rows that a layer norm gave: plain projects keys and values first;
absorbed does not, by our kernel, by SDPA with heads as wide as a row, and by ffpa-attn, which is made for such. A shape
is a size of DINOv2, frames F and looks at each frame. An implementation that is not within tolerance of float64 is not
timed and ends the run, and so does an SDPA that takes another backend than it should.

Times are medians with 20/80 quantiles over buffers that together exceed the device's cache, on a GPU of replays of one
CUDA graph. GB/s counts what the operation must move (inputs read once, outputs written once), and
`of_copy` is the share of what a copy of as many bytes reaches. `times_general` is the best general kernel's time over
this one's. Peak memory is measured on a GPU only. Writes a CSV.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.absorbed_attention import absorbed_attention
from kernels.bench_timing import Implementation, Inputs, buffers, copy_speed, measure
from kernels.common import triton
from kernels.query_attention import query_attention

HEADS = {"small": 6, "base": 12}  # DINOv2, heads of width 64
ROWS, WIDTH, SCALE = 257, 64, 64**-0.5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # relative RMS of a kernel
BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
GENERAL = ("sdpa", "flex", "ffpa")  # names of implementations that start like this are general kernels
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(implementation: str) -> Implementation:
    return lambda t, looks: query_attention(
        t["query"], t["key"], t["value"], looks, SCALE, implementation=implementation
    )


def general(attend: Attend) -> Implementation:
    """A general kernel [F,H,L,d] x [F,H,N,d], the L looks of a frame as its queries (all frames have as many)."""

    def run(t: Inputs, looks: Tensor | None) -> Tensor:
        query = t["query"].unflatten(0, (t["key"].shape[0], -1)).transpose(1, 2)
        return attend(query, t["key"].transpose(1, 2), t["value"].transpose(1, 2)).transpose(1, 2).flatten(0, 1)

    return run


def sdpa(backend: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, BACKENDS[backend])):
            return nnf.scaled_dot_product_attention(query, key, value, scale=SCALE)

    return attend


def backend_taken(run: Implementation, inputs: Inputs, looks: Tensor | None) -> str:
    """The backend of SDPA that runs, by the operators that are called."""
    called = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    with Calls():
        run(inputs, looks)
    return next((name for name in BACKENDS if any(f"_product_{name}_attention" in op for op in called)), "math")


def flex(backend: str) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    options: Any = {"BACKEND": backend}
    return lambda query, key, value: compiled(query, key, value, scale=SCALE, kernel_options=options)


def projected(attend: Implementation) -> Implementation:
    """Keys and values made from the rows first, as a layer does, by two projections."""

    def run(t: Inputs, looks: Tensor | None) -> Tensor:
        key, value = (
            nnf.linear(t["hidden"], t[f"{name}_weight"], t[f"{name}_bias"]).unflatten(-1, (-1, WIDTH))
            for name in ("key", "value")
        )
        return attend(t | {"key": key, "value": value}, looks)

    return run


def absorbed(implementation: str) -> Implementation:
    def run(t: Inputs, looks: Tensor | None) -> Tensor:
        rest = {name: t[name] for name in t if name not in ("query", "hidden")}
        return absorbed_attention(t["query"], t["hidden"], looks, SCALE, implementation=implementation, **rest)

    return run


def absorbed_by(attend: Attend) -> Implementation:
    """The absorbed form with a general kernel for the pooling: one head as wide as a row, each head a query."""

    def run(t: Inputs, looks: Tensor | None) -> Tensor:
        query, heads = t["query"], t["query"].shape[1]
        key, value = (t[f"{name}_weight"].unflatten(0, (heads, -1)) for name in ("key", "value"))
        folded = torch.einsum("khd,hdw->khw", query, key)
        x = t["hidden"][:, None]
        rows = folded.unflatten(0, (len(x), -1)).flatten(1, 2)[:, None]  # [F,1,looks*H,D]
        pooled = attend(rows, x, x)[:, 0].unflatten(1, (-1, heads)).flatten(0, 1)
        bias = t["value_bias"] + 0.0 * t["key_bias"]  # softmax drops the bias of keys: it gets the gradient zero
        return torch.einsum("khw,hdw->khd", pooled, value) + bias.unflatten(0, (heads, -1))

    return run


def implementations(op: str, device: str) -> dict[str, Implementation]:
    """What is compared for an operation: the eager reference first, then general kernels, then ours."""
    ours = ["triton"] if device == "cuda" and triton is not None else []
    backends = {f"sdpa_{name}": sdpa(name) for name in BACKENDS if device == "cuda" or name in ("flash", "math")}
    wide_names = ("math", "efficient") if device == "cuda" else ("math",)
    wide = {f"sdpa_absorbed_{name}": absorbed_by(sdpa(name)) for name in wide_names}
    if device == "cuda" and op == "query":
        backends |= {"flex": flex("TRITON"), "flex_decode": flex("TRITON_DECODE")}
    if device == "cuda" and op == "hidden" and find_spec("ffpa_attn"):
        ffpa = import_module("ffpa_attn").ffpa_attn_func
        wide["ffpa_absorbed"] = absorbed_by(lambda query, key, value: ffpa(query, key, value, scale=SCALE))
    if op == "hidden":
        named = {"plain_reference": projected(plain("reference")), "absorbed_reference": absorbed("reference")}
        named |= {name: projected(general(attend)) for name, attend in backends.items()} | wide
        for name in ours:
            named |= {f"plain_{name}": projected(plain(name)), f"absorbed_{name}": absorbed(name)}
        return named
    named = {"reference": plain("reference")} | {name: general(attend) for name, attend in backends.items()}
    return named | {name: plain(name) for name in ours}


def make_inputs(op: str, heads: int, frames: int, looks: int, dtype: torch.dtype, device: str) -> Inputs:
    """Random inputs; layer-normalised rows for `hidden`, weights that keep their scale."""
    width = heads * WIDTH

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    inputs = {"query": draw(frames * looks, heads, WIDTH)}
    if op == "query":
        return inputs | {name: draw(frames, ROWS, heads, WIDTH) for name in ("key", "value")}
    inputs["hidden"] = nnf.layer_norm(draw(frames, ROWS, width).float(), (width,)).to(dtype)
    for name in ("key", "value"):
        inputs |= {f"{name}_weight": draw(width, width, scale=width**-0.5), f"{name}_bias": draw(width)}
    return inputs


def moved(inputs: Inputs, mode: str, grads: str) -> int:
    """Bytes the operation must move: its large inputs read once a direction, their gradients written once."""
    frames = sum(t.numel() * t.element_size() for name, t in inputs.items() if name in ("key", "value", "hidden"))
    backward = frames * (2 if grads == "all" else 1)
    return {"forward": frames, "backward": backward, "both": frames + backward}[mode]


def wrong(run: Implementation, inputs: Inputs, looks: Tensor | None, per_frame: int, limit: float) -> str | None:
    """What is out of tolerance against the float64 reference over the first frames, in words."""
    few = 2
    names = [name for name in inputs if name in ("query", "key", "value", "hidden")]

    def results(run: Implementation, tensors: Inputs, looks: Tensor | None, slope: Tensor) -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        out = run(leaves, looks)
        return [out, *torch.autograd.grad(out, [leaves[name] for name in names], slope)]

    slope = torch.randn_like(inputs["query"])
    cut = {"query": few * per_frame, "key": few, "value": few, "hidden": few}
    exact = {name: (t[: cut[name]] if name in cut else t).double() for name, t in inputs.items()}
    exact_looks = None if looks is None else looks[: few * per_frame]
    attend = plain("reference") if "key" in inputs else projected(plain("reference"))
    wanted = results(attend, exact, exact_looks, slope[: few * per_frame].double())
    for name, got, want in zip(["out", *names], results(run, inputs, looks, slope), wanted):
        error = ((got[: want.shape[0]].double() - want).norm() / want.norm()).item()
        if not error <= limit:
            return f"{name}: relative error {error:.2e}, allowed {limit:.0e}"
    return None


def rows_of(op: str, shape: str, dtype: torch.dtype, grads: str, repeat: int, device: str) -> Iterator[dict]:
    """The table's rows for one operation and shape. Raises SystemExit for a kernel that is wrong."""
    size, *numbers = shape.split(":")
    heads, frames, per_frame = HEADS[size], int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 1
    looks = None if per_frame == 1 else torch.arange(frames * per_frame, device=device) // per_frame
    first = make_inputs(op, heads, frames, per_frame, dtype, device)
    count = buffers(moved(first, "forward", grads), device)
    sets = [first] + [make_inputs(op, heads, frames, per_frame, dtype, device) for _ in range(count - 1)]
    # projecting rounds to bf16 between the steps, in every implementation alike
    limit = TOLERANCE[dtype] * (3 if op == "hidden" else 1)
    rows = []
    for name, run in implementations(op, device).items():
        try:
            fault = wrong(run, first, looks, per_frame, limit)
            taken = backend_taken(run, first, looks) if name.startswith("sdpa") else ""
            if not fault and taken and not name.endswith(taken):
                fault = f"SDPA took its backend '{taken}'"
            times, peak = ({}, None) if fault else measure(run, sets, looks, grads, repeat, device)
        except (RuntimeError, ValueError) as error:
            if not name.startswith(GENERAL):
                raise
            print(f"{op} {name} does not take {shape} {dtype}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if fault:
            raise SystemExit(f"kernels.bench: {op} {name} on {shape} {dtype} is wrong, not timed: {fault}")
        for mode, (low, median, high) in times.items():
            rows.append(
                {
                    "op": op, "implementation": name, "mode": mode, "grads": grads, "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."), "us": median.item(), "us20": low.item(),
                    "us80": high.item(), "gb_s": moved(first, mode, grads) / median.item() / 1e3, "peak_mb": peak,
                }
            )  # fmt: skip
    for mode in ("forward", "backward", "both"):
        same = [row for row in rows if row["mode"] == mode]
        best = min((row["us"] for row in same if row["implementation"].startswith(GENERAL)), default=float("nan"))
        speed = copy_speed(moved(first, mode, grads), repeat, device)
        for row in same:
            yield row | {"of_copy": row["gb_s"] / speed, "times_general": best / row["us"]}


def origin(device: str) -> dict[str, str]:
    """Device, driver, versions and commit: what a figure is worth without is nothing."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    versions = {"torch": torch.__version__, "triton": "none" if triton is None else triton.__version__}
    nvidia = shutil.which("nvidia-smi") if device == "cuda" else None
    query = [nvidia, "--query-gpu=driver_version", "--format=csv,noheader"] if nvidia else ["true"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    return {"device": name, "driver": driver or "none", **versions, "commit": found.stdout.strip() or "unknown"}


def show(row: dict) -> str:
    """A row as a line of the table; the heading for the column names themselves."""
    numbers = ("us", "us20", "us80", "gb_s", "of_copy", "times_general", "peak_mb")
    words = [f"{row[name]:<{n}}" for name, n in (("op", 7), ("implementation", 19), ("mode", 9), ("grads", 6))]
    words += [f"{row[name]:<{n}}" for name, n in (("shape", 13), ("dtype", 9))]
    values = [row[name] for name in numbers]
    return "".join(words) + "".join(
        f"{value:>10}" if isinstance(value, str) else f"{'-':>10}" if value is None else f"{value:>10.2f}"
        for value in values
    )


def _shape(text: str) -> str:
    if not re.fullmatch(rf"({'|'.join(HEADS)}):[1-9]\d*(:[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not SIZE:FRAMES[:LOOKS], for example small:64; SIZE is small or base"
        )
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help shows all\n")


def main(arguments: list[str] | None = None) -> None:
    """Parse, check, measure, write; see the module."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"cpu": ["small:16", "small:64", "base:16", "small:8:8"]}.get(
        device, ["small:64", "small:512", "small:4096", "base:64", "base:512", "base:4096", "small:64:8"]
    )
    parser = _Parser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("op", nargs="?", choices=("query", "hidden"), help="default: both")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=shapes, metavar="SIZE:FRAMES[:LOOKS]")
    dtypes = ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--grads", nargs="+", default=["all", "query"], choices=["all", "query"])
    parser.add_argument("--repeat", type=int, default=50 if device == "cuda" else 15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    about = origin(device)
    print(f"device: {about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    if device == "cuda" and not find_spec("ffpa_attn"):
        print("ffpa_absorbed: not installed (pip install ffpa-attn)")
    names = ("op", "implementation", "mode", "grads", "shape", "dtype", "us", "us20", "us80", "gb_s", "of_copy",
             "times_general", "peak_mb")  # fmt: skip
    print(show({name: name for name in names}))
    rows = []
    for op in [options.op] if options.op else ["query", "hidden"]:
        for shape in options.shapes:
            for dtype in options.dtypes:
                for grads in options.grads:
                    for row in rows_of(op, shape, getattr(torch, dtype), grads, options.repeat, device):
                        print(show(row), flush=True)
                        rows.append(row | about)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kernels_{device if device == 'cpu' else about['device'].replace(' ', '_')}.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        for row in rows:
            table.writerow({n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items()})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
