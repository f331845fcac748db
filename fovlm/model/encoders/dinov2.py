"""DINOv2 (arXiv 2304.07193), with and without register tokens (arXiv 2309.16588)."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Dinov2Config, PreTrainedConfig

from fovlm.model.encoders.base import Block, Family

# transformers 5.23 has flat names inside a layer. Earlier releases nested them; the weights are released so, and all
# releases of transformers read that.
RELEASED_NAMES = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}


class Dinov2(Family):
    kinds: tuple[str, ...] = ("dinov2", "dinov2_with_registers")

    def layers(self, backbone: Any) -> nn.ModuleList:
        return backbone.encoder.layer

    def block(self, layer: Any) -> Block:
        attention = layer.attention
        if hasattr(attention, "q_proj"):
            projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        else:
            inner = attention.attention
            projections = (inner.query, inner.key, inner.value, attention.output.dense)
        return Block(layer.norm1, *projections, layer.norm2, layer.mlp, layer.layer_scale1, layer.layer_scale2)

    def norm(self, backbone: Any) -> nn.Module:
        return backbone.layernorm

    def prefix(self, config: PreTrainedConfig) -> int:
        return 1 + getattr(config, "num_register_tokens", 0)

    def unused(self, backbone: Any) -> Iterable[nn.Parameter]:
        mask = backbone.embeddings.mask_token  # only masked pre-training uses it
        return () if mask is None else (mask,)


def released_name(name: str) -> str:
    """The name under which a weight of DINOv2 is released; other names stay as they are."""
    if "encoder.layer." in name:
        for ours, theirs in RELEASED_NAMES.items():
            name = name.replace(ours, theirs)
    return name


def config_of(shapes: dict[str, tuple[int, ...]]) -> Dinov2Config:
    """The configuration of a DINOv2 from the shapes of its weights, by released names; heads are 64 wide in all sizes
    (arXiv 2304.07193, table 16). Raises KeyError when a weight that decides something is missing.
    """
    D, _, patch, _ = shapes["embeddings.patch_embeddings.projection.weight"]
    side = round((shapes["embeddings.position_embeddings"][1] - 1) ** 0.5)
    return Dinov2Config(
        hidden_size=D,
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layer.")),
        num_attention_heads=max(D // 64, 1),
        mlp_ratio=shapes["encoder.layer.0.mlp.fc1.weight"][0] // D,
        image_size=side * patch,
        patch_size=patch,
        qkv_bias="encoder.layer.0.attention.attention.query.bias" in shapes,
        use_mask_token="embeddings.mask_token" in shapes,
    )
