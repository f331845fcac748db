"""A test on a GPU runs the code of a test on a CPU: parameters for both."""

from typing import Any

import pytest
import torch


def needs_gpus(count: int) -> list[Any]:
    """Marks of what runs on so many GPUs."""
    found = torch.cuda.device_count()
    skip = pytest.mark.skipif(found < count, reason=f"needs {count} GPU{'s' * (count > 1)}, here are {found}")
    return [pytest.mark.gpu, skip]


DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpus(1))]
