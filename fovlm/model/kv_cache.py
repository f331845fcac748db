"""The KV cache of a stream: it grows in place, can drop its last tokens, and can overwrite old ones.

transformers' own cache concatenates: every token copies all earlier ones. Here a layer's buffers grow by CHUNK tokens
at a time and a token is written into its place: a frame costs the same at any length, and memory grows by
2 * key heads * head width numbers per layer and frame.

Attention does not depend on the order in which keys are stored, since rotary embeddings are in the keys. So a full
window slides by writing the newest frame over the oldest one.

For one query over many keys, PyTorch's grouped attention is slow on a CPU: it repeats the keys, or reads them once for
each head that shares them. `attend` takes the heads that share keys as rows of one query. In bf16 on a CPU two plain
products are faster still, but the library below compiles them for every shape: `update` then returns whole buffers,
whose length changes once in CHUNK tokens, with a mask over the unused part. At 4,000 tokens of SmolLM2-135M a layer
takes 0.4 ms this way, 0.8 with the rows in one fused call, and 5 in transformers.

Letters: B conversations, G key heads, n tokens, d head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fovlm.model.attention import Segments, attend_by_sample

CHUNK = 256  # tokens
ATTENTION = "sdpa_rows"  # the name of `attend` in transformers


class Layer(DynamicLayer):
    """One layer: `keys` and `values` [B, G, n, d] are views of the first n tokens of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized: bool = False
        self.buffers: list[Tensor] = []  # of keys and of values, [B, G, at least n, d]
        self.overwrite_at: int | None = None  # the stored token that the next one replaces

    def key_count(self, s: int) -> int:
        """How many keys `update` returns for s new tokens: all so far, or for one token a whole buffer."""
        if self.overwrite_at is not None:
            return self.get_seq_length()
        end = self.get_seq_length() + s
        return _round_up(end) if s == 1 and self.buffers and _by_products(self.keys) else end

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values [B, G, s, d] of s new tokens -> the first `key_count(s)` keys and values."""
        count = self.key_count(key_states.shape[2])
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (torch.empty_like(x[:, :, :0]) for x in (key_states, value_states))
            self.buffers, self.is_initialized = [self.keys, self.values], True
        new = (key_states, value_states)
        if self.overwrite_at is not None:
            for buffer, x in zip(self.buffers, new, strict=True):
                buffer[:, :, self.overwrite_at : self.overwrite_at + x.shape[2]] = x
            return self.keys, self.values
        n = self.get_seq_length()
        end = n + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            for i, x in enumerate((self.keys, self.values)):
                B, G, _, d = x.shape
                self.buffers[i] = x.new_zeros(B, G, _round_up(end), d)  # masked entries must be finite too
                self.buffers[i][:, :, :n] = x
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, n:end] = x
        self.truncate(end)
        keys, values = (buffer[:, :, :count] for buffer in self.buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many keys there will be, 0)."""
        return self.key_count(query_length), 0

    def truncate(self, n: int) -> None:
        """Drop everything behind the first n tokens."""
        if self.buffers:  # there are none before the first token
            self.keys, self.values = (buffer[:, :, :n] for buffer in self.buffers)


class ContextCache(Cache):
    """A cache of such layers."""

    def __init__(self, layers: int):
        super().__init__(layers=[Layer() for _ in range(layers)])

    def __len__(self) -> int:
        """n."""
        return int(self.get_seq_length())

    def forget(self, n: int) -> None:
        """Drop everything behind the first n tokens. The buffers stay."""
        for layer in self.layers:
            layer.truncate(n)

    @contextmanager
    def writing(self, place: int | None) -> Iterator[None]:
        """The next token replaces the one stored at `place`; None: it goes behind all others.

        When the body raises, every layer is restored, whether or not it has the new token.
        """
        n, over = len(self), [] if place is None else [buffer for layer in self.layers for buffer in layer.buffers]
        old = [buffer[:, :, place].clone() for buffer in over]
        for layer in self.layers:
            layer.overwrite_at = place
        try:
            yield
        except BaseException:
            self.forget(n)
            for buffer, x in zip(over, old, strict=True):
                buffer[:, :, place] = x
            raise
        finally:
            for layer in self.layers:
                layer.overwrite_at = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are stored."""
        return sum(x.nbytes for layer in self.layers if layer.buffers for x in (layer.keys, layer.values))

    def copies(self, times: int) -> Cache:
        """A cache of transformers with every conversation `times` times, for beam search."""
        copy = DynamicCache()
        for number, layer in enumerate(layer for layer in self.layers if layer.buffers):
            copy.update(*(x.repeat_interleave(times, dim=0) for x in (layer.keys, layer.values)), number)
        return copy


def _by_products(x: Tensor) -> bool:
    """Whether plain products are faster than fused attention for one query over many keys."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _round_up(n: int) -> int:
    return -(-n // CHUNK) * CHUNK


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" for queries [B, H, s, d] over keys and values [B, G, n, d] -> ([B, s, H, d], None).

    With `segments` the one sequence is a pack, see `attention.py`. One token (s = 1) takes the way that the module
    describes; `attention_mask` [B, 1, s, n] is True where a key is seen.
    """
    if segments is not None:
        return attend_by_sample(query, key, value, segments, options.get("scaling")), None
    B, H, s, d = query.shape
    G, n = key.shape[1:3]
    scale = options.get("scaling")
    whole_buffers = attention_mask is not None and n % CHUNK == 0 and _by_products(query)
    if s > 1 or torch.is_grad_enabled() or (attention_mask is not None and not whole_buffers):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = query.reshape(B, G, H // G, d)
    if attention_mask is None:
        seen = nnf.scaled_dot_product_attention(rows, key, value, scale=scale)
    else:
        seen = _two_products(rows, key, value, attention_mask, d**-0.5 if scale is None else scale)
    return seen.reshape(B, 1, H, d), None


def _two_products(rows: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of rows [B, G, r, d]; scores are rounded to bf16 and weighed in fp32, as in transformers' "eager"."""
    scores = torch.matmul(rows, key.transpose(2, 3)).float().mul_(scale).masked_fill_(~mask, -torch.inf)
    return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)


def mask_of(q_length: int, kv_length: int, q_offset: int = 0, **options: Any) -> Tensor | None:
    """transformers' mask for "sdpa", which is never left out where `update` returns unused keys."""
    if kv_length > q_offset + q_length:
        options["allow_is_causal_skip"] = False
    return sdpa_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset, **options)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, mask_of)
