"""Tiny models and packs for the tests: every part of the real thing, small enough for two cores."""

import math

import torch
import torch.nn.functional as nnf

from fovlm.data.packing import Batch, PackSize, Sample, collate
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.encoders.families import FAMILIES
from fovlm.model.modeling import FoveatedVLM

FRAME = 28  # pixels: 4 x 4 patches of 7
VOCABULARY = 64
BUDGET = PackSize(frames=6, looks=10, text=30, prompt=12)


ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": FRAME, "patch_size": 7}
ENCODERS = {
    "dinov2": ENCODER | {"mlp_ratio": 2},
    "dinov2_with_registers": ENCODER | {"mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": ENCODER | {"intermediate_size": 64, "num_register_tokens": 4},
    "siglip_vision_model": ENCODER | {"intermediate_size": 64},
    "siglip2_vision_model": {k: v for k, v in ENCODER.items() if k != "image_size"}
    | {"intermediate_size": 64, "num_patches": 16},
}
LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLMS = {
    "llama": LLM,
    "qwen3": LLM | {"head_dim": 16},
    "smollm3": LLM | SPECIAL | {"no_rope_layer_interval": 2},
}


def tiny_model(seed: int = 0, encoder: str = "dinov2", llm: str = "llama", **settings) -> FoveatedVLM:
    """A model of some 50,000 parameters, with backbones of these types; `settings` go to FoveatedConfig."""
    torch.manual_seed(seed)
    settings = {"query_dim": 24, "frame_size": FRAME, **settings}
    backbones = {
        "llm_config": {"model_type": llm, **LLMS[llm]},
        "encoder_config": {"model_type": encoder, **ENCODERS[encoder]},
    }
    return FoveatedVLM(FoveatedConfig(**backbones, **settings))


def sample(
    key: str, frames: int = 0, looks: int | None = None, text: int = 6, prompt: int = 0, role: str = ""
) -> Sample:
    """A random sample, the same for the same key."""
    random = torch.Generator().manual_seed(sum(map(ord, key)))
    return Sample(
        key=key,
        source="tiny",
        frames=torch.randint(0, 256, (frames, 3, FRAME, FRAME), dtype=torch.uint8, generator=random),
        looks=frames if looks is None else looks,
        tokens=torch.randint(0, VOCABULARY, (text,), generator=random),
        weight=torch.ones(text),
        prompt=prompt,
        role=role,
    )


def pack(samples: list[Sample], size: PackSize | None = BUDGET, **options) -> Batch:
    return collate(samples, FRAME, size=size, **options)


def nll_of(model: FoveatedVLM, batch: Batch, number: int, **options) -> torch.Tensor:
    """The nll of one sample's tokens inside a pack."""
    return model(batch, **options)[batch.text_segment == number]


def dense_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """`torch.nn.attention.varlen.varlen_attn` with a dense mask, for a CPU; causal, over one pack."""
    assert window_size == (-1, 0)
    assert query.dtype == key.dtype == value.dtype
    at = torch.arange(len(query), device=query.device)
    segment = torch.searchsorted(cu_seq_q, at, right=True)
    mask = (segment[:, None] == segment[None, :]) & (at[:, None] >= at[None, :])
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    seen = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return seen[0].transpose(0, 1)


def pixels(frames: torch.Tensor, kind: str = "dinov2") -> torch.Tensor:
    """Frames u8 [F, 3, y, x] as a model of this type was trained to see them."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (FAMILIES[kind].mean, FAMILIES[kind].std))
    return (frames.float() / 255 - mean) / std


def outcomes(model: FoveatedVLM, std: float = 1.0, frames: torch.Tensor | None = None) -> tuple[float, float]:
    """How alike different queries make a look (mean correlation of what they bring back), and how flat they attend
    (entropy over its most)."""
    random = torch.Generator().manual_seed(0)
    if frames is None:
        frames = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8, generator=random)
    queries = [q.expand(len(frames), -1) for q in std * torch.randn(8, model.config.query_dim, generator=random)]
    with torch.no_grad():
        cache = model.encoder.encode_only(frames)
        seen = torch.stack([model.look(q, cache) for q in queries], dim=1)  # [F, queries, D]
        weights = [model.encoder.look_weights(model.connector.query_in(q), cache) for q in queries]
    alike = torch.stack([torch.corrcoef(f)[~torch.eye(8, dtype=torch.bool)].mean() for f in seen]).mean()
    entropy = -(torch.stack(weights) * torch.stack(weights).clamp(min=1e-9).log()).sum(-1).mean()
    return float(alike), float(entropy) / math.log(weights[0].shape[-1])
