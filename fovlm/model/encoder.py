"""DINOv2: encode a frame once, look at it many times. The one place that knows Hugging Face's names inside it.

`encode` walks the patches through all layers and keeps each layer's keys and values; `look` walks one query through
the same layers, attending to what was kept. So every key and value is computed once, for the patches' own attention
and for every look (a common mistake computes them twice). In the last layer only looks would want them: there the rows
are kept, and the projections are absorbed into the looks (`absorbs` is the rule).

A look that is the same for every frame can ride along in the patch walk as row N: attention of N + 1 rows over N keys.

Letters: F frames, N patches + CLS, D width, H heads, d head width (D = H * d), K looks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Dinov2Config, Dinov2Model

from kernels.absorbed_attention import absorbed_attention, available
from kernels.query_attention import query_attention

# ImageNet mean and deviation, with which DINOv2 was trained (arXiv 2304.07193; its released processor config).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

LayerCache = tuple[
    Tensor, ...
]  # of one layer: key and value, each [F, N, H, d]; or the one [F, N, D] both are made from


@dataclass
class Cache:
    """What looks attend to, layer by layer. A shallow look has one layer."""

    layers: list[LayerCache]

    def frames(self, index: Tensor | slice) -> "Cache":
        """The same cache for some of the frames."""
        return Cache([tuple(t[index] for t in kept) for kept in self.layers])


@dataclass
class Parts:
    """The modules of one DINOv2 layer, whatever the installed transformers calls them."""

    norm1: nn.Module
    query: nn.Module
    key: nn.Linear
    value: nn.Linear
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


# How older releases of transformers named what `parts` names, which is also how DINOv2's weights are released.
RELEASED_NAMES = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}


def released_name(name: str) -> str:
    """The name under which a weight of DINOv2 is released, which every release of transformers can read."""
    for ours, theirs in RELEASED_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def config_of(shapes: dict[str, tuple[int, ...]]) -> Dinov2Config:
    """The configuration of a DINOv2 from the shapes of its weights, by released names; heads are 64 wide in all sizes
    (arXiv 2304.07193, table 16). Raises KeyError when one that tells something is missing.
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


def heads(x: Tensor, width: int) -> Tensor:
    """[..., H * d] -> [..., H, d] without a copy."""
    return x.unflatten(-1, (-1, width))


def walk_layer(layer: nn.Module, x: Tensor, n: int, d: int, last: bool, absorb: bool) -> tuple[Tensor, LayerCache]:
    """One layer for the rows x [F, n or n + 1, D] over the keys of its first n rows.

    Returns the rows behind the layer and what it keeps for looks: normed rows (`absorb`) or keys and values. In the
    last layer only the row beyond the patches goes on, if there is one: it is a look at every frame.
    """
    p = parts(layer)
    normed = p.norm1(x)
    if last and absorb:
        kept: LayerCache = (normed[:, :n],)
    else:
        key, value = heads(p.key(normed), d)[:, :n], heads(p.value(normed), d)[:, :n]
        kept = (normed[:, :n],) if absorb else (key, value)
    if last:
        row = x[:, n:]
        return look_layer(layer, row[:, 0], kept, None, d)[:, None] if row.shape[1] else row, kept
    query = heads(p.query(normed), d)
    seen = nnf.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    x = x + p.scale1(p.out(seen.transpose(1, 2).flatten(2)))
    return x + p.scale2(p.mlp(p.norm2(x))), kept


def look_layer(layer: nn.Module, x: Tensor, kept: LayerCache, frame_of_look: Tensor | None, d: int) -> Tensor:
    """One layer for the looks x [K, D] over what it kept of F frames."""
    p = parts(layer)
    seen = attend(p, heads(p.query(p.norm1(x)), d), kept, frame_of_look, d**-0.5)
    x = x + p.scale1(p.out(seen.flatten(1)))
    return x + p.scale2(p.mlp(p.norm2(x)))


def attend(p: Parts, query: Tensor, kept: LayerCache, frame_of_look: Tensor | None, scale: float) -> Tensor:
    """What the looks' queries [K, H, d] bring back from a layer [K, H, d], in the form of what it kept."""
    if len(kept) == 2:
        return query_attention(query, *kept, frame_of_look, scale)
    return absorbed_attention(
        query,
        kept[0],
        frame_of_look,
        scale,
        norm_weight=None,  # the rows have the norm's weight and bias in them already
        norm_bias=None,
        key_weight=p.key.weight,
        key_bias=p.key.bias,
        value_weight=p.value.weight,
        value_bias=p.value.bias,
    )


def absorbs(x: Tensor, last: bool) -> bool:
    """The rule: whether a layer that gets the rows x [F, N or N + 1, D] keeps rows for looks, not keys and values.

    Layers before the last make keys and values for their patches anyway, and over those a look is at least as fast. The
    last would make them for looks alone: without, it takes half the time at one look a frame, and still less at 64
    (benchmarks/results/attention_forms.csv). On a GPU a kernel must exist: plain PyTorch would copy rows for each look.
    """
    return last and (not x.is_cuda or available(x))


def weights_of(query: Tensor, key: Tensor, frame_of_look: Tensor | None, scale: float) -> Tensor:
    """The attention weights f32 [K, H, N] of queries [K, H, d] over keys [F, N, H, d], for looking at them."""
    key = key if frame_of_look is None else key[frame_of_look]
    return (torch.einsum("khd,knhd->khn", query, key).float() * scale).softmax(-1)


class Encoder(nn.Module):
    """DINOv2 with `encode` and `look`.

    `deep=False` is the shallow ablation: one cross-attention over the final features, which serve as keys and values
    without projections of their own. `recompute` checkpoints each layer of the patch walk. `attention` is "auto" (the
    rule of `absorbs`), or one form for all layers: "plain" keeps keys and values, "absorbed" rows.
    """

    def __init__(self, dino: Dinov2Model, deep: bool = True, recompute: bool = False, attention: str = "auto"):
        super().__init__()
        config = dino.config
        if config.drop_path_rate or config.hidden_dropout_prob or config.attention_probs_dropout_prob:
            raise ValueError("the walk has no dropout: set drop_path_rate and both dropout rates of DINOv2 to 0")
        if dino.embeddings.mask_token is not None:
            dino.embeddings.mask_token.requires_grad_(False)  # only masked pre-training uses it
        self.dino = dino
        self.deep = deep
        self.recompute = recompute
        self.attention = attention
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
            layers: list[LayerCache] = []
            for layer in self.dino.encoder.layer:
                last = layer is self.dino.encoder.layer[-1]
                x, kept = self._run(layer, x, n, last, self._absorbs(x, last))
                layers.append(kept)
            return Cache(layers), self.dino.layernorm(x[:, 0]) if row is not None else x

    def features(self, frames: Tensor) -> Tensor:
        """DINOv2's final features [F, N, D] of u8 frames [F, 3, height, width]: CLS first, then the patches by row."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            x = self.embed(frames)
            for layer in self.dino.encoder.layer:
                x, _ = self._run(layer, x, x.shape[1], last=False, absorb=False)
            return self.dino.layernorm(x)

    def look(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """Walk the looks [K, D] through all layers; look k sees frame `frame_of_look`[k] (None: frame k) -> [K, D]."""
        if not self.deep:
            ((key, value),) = cache.layers
            d = self.head_width
            return query_attention(heads(query, d).to(key.dtype), key, value, frame_of_look, d**-0.5).flatten(1)
        x = query.to(cache.layers[0][0].dtype)
        for layer, kept in zip(self.dino.encoder.layer, cache.layers, strict=True):
            x = self._look_layer(layer, x, kept, frame_of_look, self.head_width)
        return self.dino.layernorm(x)

    @torch.no_grad()
    def look_weights(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """Where the looks [K, D] look: attention weights f32 [layers, K, H, N], for pictures and for the entropy."""
        d, seen = self.head_width, []
        if not self.deep:
            ((key, _),) = cache.layers
            return weights_of(heads(query, d).to(key.dtype), key, frame_of_look, d**-0.5)[None]
        x = query.to(cache.layers[0][0].dtype)
        for layer, kept in zip(self.dino.encoder.layer, cache.layers, strict=True):
            p = parts(layer)
            key = kept[0] if len(kept) == 2 else heads(p.key(kept[0]), d)
            seen.append(weights_of(heads(p.query(p.norm1(x)), d), key, frame_of_look, d**-0.5))
            x = look_layer(layer, x, kept, frame_of_look, d)
        return torch.stack(seen)

    def embed(self, frames: Tensor) -> Tensor:
        """Patch, CLS and position embeddings [F, N, D] of u8 frames [F, 3, height, width], normalised on the device."""
        weight = self.dino.embeddings.cls_token
        mean = torch.tensor(MEAN, device=frames.device)[:, None, None]
        std = torch.tensor(STD, device=frames.device)[:, None, None]
        pixels = (frames.float() / 255 - mean) / std
        return self.dino.embeddings(pixels.to(weight.dtype))

    def _absorbs(self, x: Tensor, last: bool) -> bool:
        return absorbs(x, last) if self.attention == "auto" else self.attention == "absorbed"

    def _run(self, layer: nn.Module, x: Tensor, n: int, last: bool, absorb: bool) -> tuple[Tensor, LayerCache]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._walk_layer, layer, x, n, self.head_width, last, absorb, use_reentrant=False)
        return self._walk_layer(layer, x, n, self.head_width, last, absorb)


__all__ = ["Cache", "Dinov2Config", "Dinov2Model", "Encoder"]
