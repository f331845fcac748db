"""SigLIP and SigLIP 2 (arXiv 2303.15343, 2502.14786): the vision tower, without CLS and without layer scales.

SigLIP 2 of a fixed resolution has the configuration of SigLIP. The NaFlex variant (`siglip2_vision_model`) takes
patches in place of pixels; here it gets square frames, so that no patch is padding.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fovlm.model.encoders.base import Block, Family


class Siglip(Family):
    kinds = ("siglip_vision_model", "siglip2_vision_model")
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    skipped = ("text_model.", "logit_")

    def embed(self, backbone: Any, pixels: Tensor) -> Tensor:
        embeddings = backbone.embeddings
        if backbone.config.model_type == "siglip_vision_model":
            return embeddings(pixels, interpolate_pos_encoding=True)
        p = embeddings.patch_size
        patches = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [F, 3, rows, p, columns, p]
        rows, columns = patches.shape[2], patches.shape[4]
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), rows * columns, -1)
        side = embeddings.position_embedding_size
        positions = embeddings.resize_positional_embeddings(
            embeddings.position_embedding.weight.reshape(side, side, -1),
            torch.tensor([[rows, columns]]),
            max_length=rows * columns,
        )
        return embeddings.patch_embedding(patches) + positions

    def layers(self, backbone: Any) -> nn.ModuleList:
        return backbone.encoder.layers

    def block(self, layer: Any) -> Block:
        a = layer.self_attn
        projections = (a.q_proj, a.k_proj, a.v_proj, a.out_proj)
        return Block(layer.layer_norm1, *projections, layer.layer_norm2, layer.mlp)

    def norm(self, backbone: Any) -> nn.Module:
        return backbone.post_layernorm

    def prefix(self, config: PreTrainedConfig) -> int:
        return 0

    def unused(self, backbone: Any) -> Iterable[nn.Parameter]:
        return backbone.head.parameters() if backbone.use_head else ()  # pools all patches into one vector
