"""Sizes of models, and samples drawn at random. It imports nothing of fovlm: another tree runs it too."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

LLM_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
DINO_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}


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
