"""DINOv2: encode a frame once, look at it many times. The one place that knows Hugging Face's names inside it.

`encode` walks the patches through all layers and keeps each layer's keys and values; `look` walks one query through
the same layers, attending to what was kept. So every key and value is computed once, for the patches' own attention
and for every look (a common mistake computes them twice).

A look that is the same for every frame can ride along in the patch walk as row N: attention of N + 1 rows over N keys.

Letters: F frames, N patches + CLS, D width, H heads, d head width (D = H * d), K looks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Dinov2Config, Dinov2Model

from kernels.query_attention import query_attention

# ImageNet mean and deviation, with which DINOv2 was trained (arXiv 2304.07193; its released processor config).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass
class Cache:
    """What looks attend to: per layer keys and values, each [F, N, H, d]. A shallow look has one layer."""

    layers: list[tuple[Tensor, Tensor]]

    def frames(self, index: Tensor | slice) -> "Cache":
        """The same cache for some of the frames."""
        return Cache([(key[index], value[index]) for key, value in self.layers])


@dataclass
class Parts:
    """The modules of one DINOv2 layer, whatever the installed transformers calls them."""

    norm1: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    scale1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module


def parts(layer: Any) -> Parts:
    """Name the modules of an HF `Dinov2Layer`: transformers 5.23 has flat names, older releases nest them."""
    attention = layer.attention
    if hasattr(attention, "q_proj"):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    else:
        inner = attention.attention
        projections = (inner.query, inner.key, inner.value, attention.output.dense)
    return Parts(layer.norm1, *projections, layer.layer_scale1, layer.norm2, layer.mlp, layer.layer_scale2)


def heads(x: Tensor, width: int) -> Tensor:
    """[..., H * d] -> [..., H, d] without a copy."""
    return x.unflatten(-1, (-1, width))


def walk_layer(layer: nn.Module, x: Tensor, n: int, d: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One layer for the rows x [F, n or n + 1, D] over the keys of its first n rows.

    Returns the rows behind the layer and the keys and values [F, n, H, d]. In the last layer only the rows beyond the
    patches go on (none or one), since looks need no more of the patches than their keys and values.
    """
    p = parts(layer)
    normed = p.norm1(x)
    key, value = heads(p.key(normed), d)[:, :n], heads(p.value(normed), d)[:, :n]
    if last:
        x, normed = x[:, n:], normed[:, n:]
        if x.shape[1] == 0:
            return x, key, value
    query = heads(p.query(normed), d)
    seen = nnf.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    x = x + p.scale1(p.out(seen.transpose(1, 2).flatten(2)))
    return x + p.scale2(p.mlp(p.norm2(x))), key, value


def look_layer(layer: nn.Module, x: Tensor, key: Tensor, value: Tensor, frame_of_look: Tensor | None, d: int) -> Tensor:
    """One layer for the looks x [K, D] over kept keys and values [F, N, H, d]."""
    p = parts(layer)
    query = heads(p.query(p.norm1(x)), d)
    seen = query_attention(query, key, value, frame_of_look, d**-0.5)
    x = x + p.scale1(p.out(seen.flatten(1)))
    return x + p.scale2(p.mlp(p.norm2(x)))


def weights_of(query: Tensor, key: Tensor, frame_of_look: Tensor | None, scale: float) -> Tensor:
    """The attention weights f32 [K, H, N] of queries [K, H, d] over keys [F, N, H, d], for looking at them."""
    key = key if frame_of_look is None else key[frame_of_look]
    return (torch.einsum("khd,knhd->khn", query, key).float() * scale).softmax(-1)


class Encoder(nn.Module):
    """DINOv2 with `encode` and `look`.

    `deep=False` is the shallow ablation: one cross-attention over the final features, which serve as keys and values
    without projections of their own. `recompute` checkpoints each layer of the patch walk.
    """

    def __init__(self, dino: Dinov2Model, deep: bool = True, recompute: bool = False):
        super().__init__()
        config = dino.config
        if config.drop_path_rate or config.hidden_dropout_prob or config.attention_probs_dropout_prob:
            raise ValueError("the walk has no dropout: set drop_path_rate and both dropout rates of DINOv2 to 0")
        if dino.embeddings.mask_token is not None:
            dino.embeddings.mask_token.requires_grad_(False)  # only masked pre-training uses it
        self.dino = dino
        self.deep = deep
        self.recompute = recompute
        self.head_width = config.hidden_size // config.num_attention_heads
        self._walk_layer, self._look_layer = walk_layer, look_layer

    def compile(self, **options: Any) -> None:
        """Compile one layer's walk and one layer's look; all layers then share the two graphs."""
        self._walk_layer = torch.compile(walk_layer, dynamic=False, **options)
        self._look_layer = torch.compile(look_layer, dynamic=False, **options)

    @property
    def trainable(self) -> bool:
        return self.dino.embeddings.cls_token.requires_grad

    @property
    def width(self) -> int:
        """D."""
        return self.dino.config.hidden_size

    def encode(self, frames: Tensor, row: Tensor) -> tuple[Cache, Tensor]:
        """Walk the frames u8 [F, 3, height, width] through all layers once.

        `row` [D] is a look that is the same for every frame: its outcome [F, D] is returned beside the cache and equals
        `look(row for every frame)` up to rounding. A frozen encoder keeps no graph for the patches.
        """
        if self.deep and self.trainable:
            return self._walk(frames, row)
        # With the row in it, a frozen patch walk would keep a graph for its sake alone: look at the cache instead.
        cache = self.encode_only(frames)
        return cache, self.look(row.expand(len(frames), -1), cache)

    def encode_only(self, frames: Tensor) -> Cache:
        """The cache of the frames u8 [F, 3, height, width], without a look."""
        if self.deep:
            return self._walk(frames, None)[0]
        features = heads(self.features(frames), self.head_width)
        return Cache([(features, features)])

    def _walk(self, frames: Tensor, row: Tensor | None) -> tuple[Cache, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            x = self.embed(frames)
            n = x.shape[1]
            if row is not None:
                x = torch.cat([x, row.to(x.dtype).expand(len(x), 1, -1)], dim=1)
            layers, kept = self.dino.encoder.layer, []
            for i, layer in enumerate(layers):
                x, key, value = self._run(layer, x, n, last=i == len(layers) - 1)
                kept.append((key, value))
            return Cache(kept), self.dino.layernorm(x[:, 0]) if row is not None else x

    def features(self, frames: Tensor) -> Tensor:
        """DINOv2's final features [F, N, D] of u8 frames [F, 3, height, width]: CLS first, then the patches by row."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            x = self.embed(frames)
            for layer in self.dino.encoder.layer:
                x, _, _ = self._run(layer, x, x.shape[1], last=False)
            return self.dino.layernorm(x)

    def look(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """Walk the looks [K, D] through all layers; look k sees frame `frame_of_look`[k] (None: frame k) -> [K, D]."""
        if not self.deep:
            ((key, value),) = cache.layers
            d = self.head_width
            return query_attention(heads(query, d).to(key.dtype), key, value, frame_of_look, d**-0.5).flatten(1)
        x = query.to(cache.layers[0][0].dtype)
        for layer, (key, value) in zip(self.dino.encoder.layer, cache.layers, strict=True):
            x = self._look_layer(layer, x, key, value, frame_of_look, self.head_width)
        return self.dino.layernorm(x)

    @torch.no_grad()
    def look_weights(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """Where the looks [K, D] look: attention weights f32 [layers, K, H, N], for pictures and for the entropy."""
        d, seen = self.head_width, []
        if not self.deep:
            ((key, _),) = cache.layers
            return weights_of(heads(query, d).to(key.dtype), key, frame_of_look, d**-0.5)[None]
        x = query.to(cache.layers[0][0].dtype)
        for layer, (key, value) in zip(self.dino.encoder.layer, cache.layers, strict=True):
            p = parts(layer)
            seen.append(weights_of(heads(p.query(p.norm1(x)), d), key, frame_of_look, d**-0.5))
            x = look_layer(layer, x, key, value, frame_of_look, d)
        return torch.stack(seen)

    def embed(self, frames: Tensor) -> Tensor:
        """Patch, CLS and position embeddings [F, N, D] of u8 frames [F, 3, height, width], normalised on the device."""
        weight = self.dino.embeddings.cls_token
        mean = torch.tensor(MEAN, device=frames.device)[:, None, None]
        std = torch.tensor(STD, device=frames.device)[:, None, None]
        pixels = (frames.float() / 255 - mean) / std
        return self.dino.embeddings(pixels.to(weight.dtype))

    def _run(self, layer: nn.Module, x: Tensor, n: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._walk_layer, layer, x, n, self.head_width, last, use_reentrant=False)
        return self._walk_layer(layer, x, n, self.head_width, last)


def load_dino(source: Path | str | dict) -> Dinov2Model:
    """A pretrained DINOv2 from a folder or hub id in fp32, or a random one from keyword arguments of `Dinov2Config`."""
    if isinstance(source, dict):
        return Dinov2Model(Dinov2Config(**source))
    return Dinov2Model.from_pretrained(source, dtype=torch.float32)


__all__ = ["Cache", "Dinov2Config", "Dinov2Model", "Encoder", "load_dino"]
