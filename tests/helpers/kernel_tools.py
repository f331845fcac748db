"""Shared by the kernel tests: where Triton runs, how errors are measured, memory that shows what was not written."""

import contextlib
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative RMS error against float64 of the same (rounded) inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
TYPES = list(TOLERANCE)

needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's interpreter has a process of its own: test_interpreter.py",
)


def assert_close(got: torch.Tensor, want: torch.Tensor, limit: float, what: str) -> None:
    """Relative RMS error within limit; a wanted zero must be zero to 1e-5 (1e-2 in half precision)."""
    assert got.shape == want.shape, what
    if want.numel() == 0:
        return
    error, size = (got.double() - want).square().mean().sqrt().item(), want.square().mean().sqrt().item()
    assert error <= limit * (size if size > 1e-9 else 1.0), f"{what}: error {error:.2e} of {size:.2e}"


@contextlib.contextmanager
def poisoned():
    """Uninitialised memory is NaN inside: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(run, leaves: list[torch.Tensor], slope: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """[out, a gradient per leaf] of run(*leaves) with the leaves in this type."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(dtype))]
