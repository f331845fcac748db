"""Samples drawn at random, for the benchmarks. It imports nothing of fovlm: another tree runs it too."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def draw(sizes: Iterable[Iterable[int]], frame_size: int, vocabulary: int, make: Callable[..., Any]) -> list[Any]:
    """One sample for each (frames, looks, text tokens, prompt); `make` is the `Sample` of the tree that runs it."""
    return [
        make(
            str(n),
            "drawn",
            torch.randint(0, 256, (frames, 3, frame_size, frame_size), dtype=torch.uint8),
            looks,
            torch.randint(0, vocabulary, (text,)),
            torch.ones(text),
            prompt,
        )
        for n, (frames, looks, text, prompt) in enumerate(sizes)
    ]
