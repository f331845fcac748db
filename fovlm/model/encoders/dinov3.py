"""DINOv3 ViT (arXiv 2508.10104): DINOv2's layers, and rotary positions on the patches in every layer."""

from typing import Any

from torch import Tensor, nn

from fovlm.model.encoders.base import Rotary
from fovlm.model.encoders.dinov2 import Dinov2


class Dinov3(Dinov2):
    kinds = ("dinov3_vit",)
    is_rotary = True

    def layers(self, backbone: Any) -> nn.ModuleList:
        return backbone.model.layer

    def norm(self, backbone: Any) -> nn.Module:
        return backbone.norm

    def rotary(self, backbone: Any, pixels: Tensor) -> Rotary:
        rope = backbone.rope_embeddings
        rope.eval()  # in training mode it rescales the positions at random, as in pre-training
        return rope(pixels)
