"""The encoder: encode a frame once, look at it many times.

`encode` walks the patches through all layers of a vision transformer and caches each layer's keys and values; `look`
walks one query through the same layers, attending to the cache. So every key and value is computed once, for the
patches' own attention and for every look (a common mistake computes them twice). In the last layer only looks need
them: there the rows are cached, and the projections are absorbed into the looks. Frozen and checkpointed encoders cache
rows in all layers, half the memory of keys and values (`Encoder.form` is the rule).

A look that is the same for every frame rides along in the patch walk as row N: attention of N + 1 rows over N keys.
`encoders/` knows the families: what transformers calls the parts of a layer, and which tokens precede the patches.

Letters: F frames, N rows of a frame (CLS and registers, then patches), D width, H heads, d head width (D = H * d),
K looks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fovlm.model.encoders.base import Block, Family, Rotary
from fovlm.model.encoders.families import FAMILIES, unsupported
from kernels.absorbed_attention import absorbed_attention, available
from kernels.query_attention import query_attention

# Of one layer: key and value, each [F, N, H, d]; or the rows [F, N, D] that both are projected from, before the norm if
# layers are recomputed, else behind it.
LayerCache = tuple[Tensor, ...]


@dataclass
class Cache:
    """What looks attend to, layer by layer. A shallow look has one layer."""

    layers: list[LayerCache]

    def frames(self, index: Tensor | slice) -> "Cache":
        """The same cache for some of the frames."""
        return Cache([tuple(t[index] for t in layer) for layer in self.layers])


def normalize(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Frames u8 [F, 3, height, width] -> f32, by the mean and deviation of each channel's values in [0, 1].

    Channel by channel with plain numbers: making a tensor of them on a GPU would wait for it.
    """
    channels = zip(frames.unbind(1), mean, std, strict=True)
    return torch.stack([(x.float() / 255 - m) / s for x, m, s in channels], dim=1)


def heads(x: Tensor, width: int) -> Tensor:
    """[..., H * d] -> [..., H, d] without a copy."""
    return x.unflatten(-1, (-1, width))


def rotate(x: Tensor, rotary: Rotary | None, n: int) -> Tensor:
    """Rotary positions for the patches, the last of the first n rows of x [F, n or n + 1, H, d]; None: as it is."""
    if rotary is None:
        return x
    cos, sin = (table[:, None] for table in rotary)
    prefix, patches, rest = x.split([n - len(cos), len(cos), x.shape[1] - n], dim=1)
    one, other = patches.chunk(2, dim=-1)
    return torch.cat([prefix, patches * cos + torch.cat([-other, one], dim=-1) * sin, rest], dim=1)


def walk_layer(
    family: Family, layer: nn.Module, x: Tensor, n: int, d: int, last: bool, absorb: bool, rotary: Rotary | None
) -> tuple[Tensor, LayerCache]:
    """One layer for the rows x [F, n or n + 1, D] over the keys of its first n rows.

    Returns the rows after the layer, and its cache for looks: normed rows (`absorb`) or keys and values. In the last
    layer only the row beyond the patches continues, if there is one: it is a look at every frame.
    """
    p = family.block(layer)
    normed = p.norm1(x)
    if last and absorb:
        cached: LayerCache = (normed[:, :n],)
    else:
        key, value = rotate(heads(p.key(normed), d), rotary, n)[:, :n], heads(p.value(normed), d)[:, :n]
        cached = (normed[:, :n],) if absorb else (key, value)
    if last:
        row = x[:, n:]
        return look_layer(family, layer, row[:, 0], cached, None, d)[:, None] if row.shape[1] else row, cached
    query = rotate(heads(p.query(normed), d), rotary, n)
    seen = nnf.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    x = x + p.scale1(p.out(seen.transpose(1, 2).flatten(2)))
    return x + p.scale2(p.mlp(p.norm2(x))), cached


def look_layer(
    family: Family,
    layer: nn.Module,
    x: Tensor,
    cached: LayerCache,
    frame_of_look: Tensor | None,
    d: int,
    raw: bool = False,
) -> Tensor:
    """One layer for the looks x [K, D] over its cache of F frames; `raw`: its rows, if any, are not normed.

    A look has no position, like CLS.
    """
    p = family.block(layer)
    if raw and len(cached) == 1:
        cached = (p.norm1(cached[0]),)
    seen = attend(p, heads(p.query(p.norm1(x)), d), cached, frame_of_look, d**-0.5)
    x = x + p.scale1(p.out(seen.flatten(1)))
    return x + p.scale2(p.mlp(p.norm2(x)))


def attend(p: Block, query: Tensor, cached: LayerCache, frame_of_look: Tensor | None, scale: float) -> Tensor:
    """Attention of the looks' queries [K, H, d] over a layer's cache -> [K, H, d]."""
    if len(cached) == 2:
        return query_attention(query, *cached, frame_of_look, scale)
    projections: dict[str, Any] = {"key_weight": p.key.weight, "key_bias": p.key.bias}
    projections |= {"value_weight": p.value.weight, "value_bias": p.value.bias}
    return absorbed_attention(query, cached[0], frame_of_look, scale, **projections)


def weights_of(query: Tensor, key: Tensor, frame_of_look: Tensor | None, scale: float) -> Tensor:
    """The attention weights f32 [K, H, N] of queries [K, H, d] over keys [F, N, H, d]."""
    key = key if frame_of_look is None else key[frame_of_look]
    return (torch.einsum("khd,knhd->khn", query, key).float() * scale).softmax(-1)


class Encoder(nn.Module):
    """A vision transformer with `encode` and `look`.

    `deep=False` is the shallow ablation: one cross-attention over the final features, which serve as keys and values
    without projections of their own. `recompute` checkpoints each layer of the patch walk and of a look. `attention`
    says which layers cache rows in place of keys and values: "none", "last", "all", or "auto" (the rule of `form`).
    Raises ValueError for a model of another family, and for dropout, which the walk does not have.
    """

    def __init__(self, backbone: PreTrainedModel, deep: bool = True, recompute: bool = False, attention: str = "auto"):
        super().__init__()
        config = backbone.config
        if reason := unsupported(config):
            raise ValueError(reason)
        self.family = FAMILIES[config.model_type]
        for unused in self.family.unused(backbone):
            unused.requires_grad_(False)
        self.backbone = backbone
        self.deep = deep
        self.recompute = recompute
        self.attention = attention
        self.head_width = config.hidden_size // config.num_attention_heads
        self.run_eagerly()

    def compile(self, **options: Any) -> None:
        """Compile one layer's walk and one layer's look; all layers then share the two graphs."""
        self._walk_layer = torch.compile(walk_layer, dynamic=True, **options)
        self._look_layer = torch.compile(look_layer, dynamic=True, **options)

    def run_eagerly(self) -> None:
        """Undo `compile`."""
        self._walk_layer, self._look_layer = walk_layer, look_layer

    @property
    def layers(self) -> nn.ModuleList:
        return self.family.layers(self.backbone)

    @property
    def trainable(self) -> bool:
        return next(self.layers.parameters()).requires_grad

    @property
    def form(self) -> str:
        """Which layers cache rows: "none", "last" or "all".

        The last would compute keys and values for looks alone: without them it takes half the time. The layers before
        compute them for their patches; a trainable one stores them for the backward pass in any case, a frozen or
        checkpointed one would store them for looks alone.
        """
        projections = [part for p in map(self.family.block, self.layers) for part in (p.key, p.value)]
        # A rotary key depends on its position, so that no single projection can be absorbed; an adapter is no weight.
        if self.family.is_rotary or any(type(projection) is not nn.Linear for projection in projections):
            return "none"
        return self.attention if self.attention != "auto" else "all" if self.recompute or not self.trainable else "last"

    @property
    def width(self) -> int:
        """D."""
        return self.backbone.config.hidden_size

    @property
    def prefix(self) -> int:
        """How many of the N rows of a frame come before its patches."""
        return self.family.prefix(self.backbone.config)

    def encode(self, frames: Tensor, row: Tensor) -> tuple[Cache, Tensor]:
        """Walk the frames u8 [F, 3, height, width] through all layers once.

        `row` [D] is a look that is the same for every frame: its result [F, D] is returned beside the cache and equals
        `look(row for every frame)` up to rounding. A frozen encoder keeps no graph for the patches.
        """
        if self.deep and self.trainable:
            return self._walk(frames, row)
        # With the row in it, a frozen patch walk would keep a graph for the row's sake: look at the cache instead.
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
            x, rotary = self.embed(frames)
            n = x.shape[1]
            if row is not None:
                x = torch.cat([x, row.to(x.dtype).expand(len(x), 1, -1)], dim=1)
            cache: list[LayerCache] = []
            # A GPU needs a kernel for rows: plain PyTorch would copy them for each look.
            form = self.form if not x.is_cuda or available(x) else "none"
            for layer in self.layers:
                last = layer is self.layers[-1]
                absorb = form == "all" or (last and form == "last")
                rows = x[:, :n]  # a checkpoint stores them, so looks norm them again rather than store the result
                x, cached = self._run(self._walk_layer, layer, x, n, self.head_width, last, absorb, rotary)
                cache.append((rows,) if absorb and self.recompute else cached)
            return Cache(cache), self._norm(x[:, 0]) if row is not None else x

    def features(self, frames: Tensor) -> Tensor:
        """The final features [F, N, D] of u8 frames [F, 3, height, width]: the prefix, then the patches by row."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            x, rotary = self.embed(frames)
            for layer in self.layers:
                x, _ = self._run(self._walk_layer, layer, x, x.shape[1], self.head_width, False, False, rotary)
            return self._norm(x)

    def look(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """Walk the looks [K, D] through all layers; look k sees frame `frame_of_look`[k] (None: frame k) -> [K, D]."""
        if not self.deep:
            ((key, value),) = cache.layers
            d = self.head_width
            return query_attention(heads(query, d).to(key.dtype), key, value, frame_of_look, d**-0.5).flatten(1)
        x = query.to(cache.layers[0][0].dtype)
        for layer, cached in zip(self.layers, cache.layers, strict=True):
            x = self._run(self._look_layer, layer, x, cached, frame_of_look, self.head_width, self.recompute)
        return self._norm(x)

    @torch.no_grad()
    def look_weights(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """Attention weights f32 [layers, K, H, N] of the looks [K, D]."""
        d, seen = self.head_width, []
        if not self.deep:
            ((key, _),) = cache.layers
            return weights_of(heads(query, d).to(key.dtype), key, frame_of_look, d**-0.5)[None]
        x = query.to(cache.layers[0][0].dtype)
        for layer, cached in zip(self.layers, cache.layers, strict=True):
            p = self.family.block(layer)
            key = cached[0]
            if len(cached) == 1:
                key = heads(p.key(p.norm1(key) if self.recompute else key), d)
            seen.append(weights_of(heads(p.query(p.norm1(x)), d), key, frame_of_look, d**-0.5))
            x = look_layer(self.family, layer, x, cached, frame_of_look, d, self.recompute)
        return torch.stack(seen)

    def embed(self, frames: Tensor) -> tuple[Tensor, Rotary | None]:
        """The first layer's input [F, N, D] for u8 frames [F, 3, height, width], normalised on the device, and the
        rotary positions of families that have them."""
        pixels = normalize(frames, self.family.mean, self.family.std).to(next(self.backbone.parameters()).dtype)
        return self.family.embed(self.backbone, pixels), self.family.rotary(self.backbone, pixels)

    def _norm(self, x: Tensor) -> Tensor:
        return self.family.norm(self.backbone)(x)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, self.family, *arguments, use_reentrant=False)
        return function(self.family, *arguments)
