"""DINOv3 ViT (arXiv 2508.10104): CLS and registers, and rotary positions on the patches in every layer."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from fovlm.model.encoders.base import Block, Family, Rotary


class Dinov3(Family):
    kinds = ("dinov3_vit",)
    is_rotary = True

    def layers(self, backbone: Any) -> nn.ModuleList:
        return backbone.model.layer

    def block(self, layer: Any) -> Block:
        a = layer.attention
        projections = (a.q_proj, a.k_proj, a.v_proj, a.o_proj)
        return Block(layer.norm1, *projections, layer.norm2, layer.mlp, layer.layer_scale1, layer.layer_scale2)

    def norm(self, backbone: Any) -> nn.Module:
        return backbone.norm

    def prefix(self, config: PreTrainedConfig) -> int:
        return 1 + config.num_register_tokens

    def unused(self, backbone: Any) -> Iterable[nn.Parameter]:
        return (backbone.embeddings.mask_token,)  # only masked pre-training uses it

    def rotary(self, backbone: Any, pixels: Tensor) -> Rotary:
        rope = backbone.rope_embeddings
        rope.eval()  # in training mode it rescales the positions at random, as in pre-training
        return rope(pixels)
