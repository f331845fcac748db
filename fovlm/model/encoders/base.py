"""What the patch walk and the looks need to know of a vision transformer, whatever transformers calls its parts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

Rotary = tuple[Tensor, Tensor]  # cos and sin [patches, d] of rotary positions
SAME = nn.Identity()


@dataclass
class Block:
    """The modules of one layer: x + scale1(out(attention(norm1(x)))), then x + scale2(mlp(norm2(x)))."""

    norm1: nn.Module
    query: nn.Module
    key: nn.Linear
    value: nn.Linear
    out: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale1: nn.Module = SAME
    scale2: nn.Module = SAME


class Family(ABC):
    """One family of vision transformers. It holds no weights: `backbone` is HF's model.

    Letters: F frames, N rows of a frame (prefix tokens such as CLS and registers, then the patches by row), D width.
    """

    kinds: tuple[str, ...]  # model_type of its configurations
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the pixels in training, 0 to 1; here ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    is_rotary = False  # positions are rotations of queries and keys, in every layer
    skipped: tuple[str, ...] = ()  # names of released weights that are not the encoder's start with one of these

    def embed(self, backbone: Any, pixels: Tensor) -> Tensor:
        """Normalised pixels [F, 3, height, width] -> the first layer's input [F, N, D]."""
        return backbone.embeddings(pixels)

    @abstractmethod
    def layers(self, backbone: Any) -> nn.ModuleList: ...

    @abstractmethod
    def block(self, layer: Any) -> Block: ...

    @abstractmethod
    def norm(self, backbone: Any) -> nn.Module:
        """The final norm."""

    @abstractmethod
    def prefix(self, config: PreTrainedConfig) -> int:
        """How many tokens come before the patches."""

    def unused(self, backbone: Any) -> Iterable[nn.Parameter]:
        """Parameters that neither the walk nor the looks use: they stay as loaded and out of training."""
        return ()

    def rotary(self, backbone: Any, pixels: Tensor) -> Rotary | None:
        """The rotary positions of the patches; None where positions are part of the embedding."""
        return None
