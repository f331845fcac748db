"""All that needs a GPU, part by part: make gpu

    kernel tests   on the GPU, where Triton compiles them
    model tests    attention by sample against a dense mask, compiled layers against plain ones
    engine tests   one and two GPUs against plain PyTorch
    kernels        python -m kernels.bench
    step           python -m benchmarks.step

A part whose packages are missing is left out and named, with what to install; a part that fails does not end the rest.
CSV files and plots go to benchmarks/results.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
MODEL_TESTS = ["tests/model/test_attention.py", "tests/train/test_compiled.py"]
# name -> words behind `python -m`, packages that it cannot do without
PARTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "kernel tests": (["pytest", "-m", "gpu or not slow", "tests/kernels"], ("pytest", "hypothesis", "triton")),
    "model tests": (["pytest", "-m", "gpu", *MODEL_TESTS], ("pytest",)),
    "engine tests": (["pytest", "-m", "gpu", "tests/train/test_engine.py"], ("pytest", "deepspeed", "webdataset")),
    "kernels": (["kernels.bench", "--out", str(RESULTS)], ("triton",)),
    "step": (["benchmarks.step"], ("matplotlib", "pydantic")),
}
ALSO = {
    "deepspeed": "step: ZeRO is left out, the plain loop runs",
    "webdataset": "step: the share of waiting for data is left out",
    "ffpa_attn": "kernels: that baseline is left out",
}


def main() -> int:
    """Every part that can run; returns 1 when one failed, or could not run."""
    if not torch.cuda.is_available():
        sys.exit("make gpu: no GPU that torch can use")
    for package, so in ALSO.items():
        if not find_spec(package):
            print(f"make gpu: {package} is not installed; {so}")
    ended = {}
    for name, (words, packages) in PARTS.items():
        if missing := [package for package in packages if not find_spec(package)]:
            ended[name] = f"left out: pip install {' '.join(missing)}"
            continue
        print(f"make gpu: {name}", flush=True)
        status = subprocess.run([sys.executable, "-m", *words], check=False).returncode
        ended[name] = "done" if status == 0 else f"failed with status {status}"
    for name, end in ended.items():
        print(f"make gpu: {name} {end}")
    return int(any(end != "done" for end in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
