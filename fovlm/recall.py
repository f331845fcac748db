"""The language model's keys and values of a stream: they grow in place, can forget a question, and can slide.

transformers' own cache concatenates: every token copies all that came before. Here a layer's buffers grow by CHUNK
tokens at a time and a token is written into its place, so a frame costs the same at any length, and memory grows by
2 * key heads * head width numbers a layer and frame.

Attention does not care in which order keys are stored: each carries its position inside (rotary embeddings). So a full
window slides by writing the newest frame over the oldest one.

Letters: B conversations, G key heads, n tokens, d head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

CHUNK = 256  # tokens


class Layer(DynamicLayer):
    """One layer: `keys` and `values` [B, G, n, d] are views of the first n tokens of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[Tensor] = []  # buffers of keys and of values, [B, G, at least n, d]
        self.put_at: int | None = None  # where the next token is written over an old one

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values [B, G, s, d] of s new tokens; gives those of all tokens."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (torch.empty_like(x[:, :, :0]) for x in (key_states, value_states))
            self.rooms, self.is_initialized = [self.keys, self.values], True
        new = (key_states, value_states)
        if self.put_at is not None:
            for room, x in zip(self.rooms, new, strict=True):
                room[:, :, self.put_at : self.put_at + x.shape[2]] = x
            return self.keys, self.values
        n = self.get_seq_length()
        end = n + key_states.shape[2]
        if end > self.rooms[0].shape[2]:
            for i, x in enumerate((self.keys, self.values)):
                B, G, _, d = x.shape
                self.rooms[i] = x.new_empty(B, G, -(-end // CHUNK) * CHUNK, d)
                self.rooms[i][:, :, :n] = x
        for room, x in zip(self.rooms, new, strict=True):
            room[:, :, n:end] = x
        self.keep(end)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many keys there will be, 0): no more than now when a token goes over another."""
        return self.get_seq_length() + (query_length if self.put_at is None else 0), 0

    def keep(self, n: int) -> None:
        """The first n tokens are what there is."""
        self.keys, self.values = (room[:, :, :n] for room in self.rooms)


class Recall(Cache):
    """A cache of such layers."""

    def __init__(self, layers: int):
        super().__init__(layers=[Layer() for _ in range(layers)])

    def __len__(self) -> int:
        """n."""
        return int(self.get_seq_length())

    def forget(self, n: int) -> None:
        """Drop everything behind the first n tokens. Their buffers stay for what comes next."""
        for layer in self.layers:
            layer.keep(n)

    def put_at(self, place: int | None) -> None:
        """The next token goes over the one stored at `place`; None: behind all others, as usual."""
        for layer in self.layers:
            layer.put_at = place

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are stored."""
        return sum(x.nbytes for layer in self.layers for x in (layer.keys, layer.values))

    def copies(self, times: int) -> Cache:
        """An ordinary cache with every conversation `times` times, for beams."""
        from transformers import DynamicCache

        copy = DynamicCache()
        for number, layer in enumerate(self.layers):
            copy.update(*(x.repeat_interleave(times, dim=0) for x in (layer.keys, layer.values)), number)
        return copy
