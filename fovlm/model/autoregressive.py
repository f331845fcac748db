"""Frame by frame, as in deployment: one look, one token into the language model's cache, the next query.

Unlike the parallel passes of training, each query here comes from the FINE tokens of the frames before it. `Stream` is
the loop; scoring (`autoregressive`), `generate`, streaming, the gaze and evaluation all run it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fovlm.data.packing import Batch, text_positions
from fovlm.model.encoder import Cache
from fovlm.model.kv_cache import ContextCache

if TYPE_CHECKING:
    from fovlm.model.modeling import FoveatedVLM


@dataclass
class Look:
    """One look of each of B conversations."""

    query: Tensor  # [B, Q]
    token: Tensor  # [B, E]: the visual token
    hidden: Tensor  # [B, E]: the language model's state at it


class Stream:
    """B conversations that grow in lockstep. `hidden` [B, E] is the language model's last state, None at the start."""

    def __init__(self, model: "FoveatedVLM"):
        self.model = model
        self.memory = ContextCache(model.llm.config.num_hidden_layers)
        self.hidden: Tensor | None = None

    def words(self, tokens: Tensor) -> Tensor:
        """Read text tokens i64 [B, s] -> the hidden states [B, s, E] at each."""
        return self._read(self.model.llm.get_input_embeddings()(tokens))

    def query(self, conversations: int) -> Tensor:
        """The query [B, Q] of the next look: from the state so far, q_first before there is any, or always q_static."""
        connector = self.model.connector
        if self.model.config.visual == "coarse":
            return connector.q_static.expand(conversations, -1)
        if self.hidden is None:
            return connector.q_first.expand(conversations, -1)
        return connector.to_query(self.hidden)

    def look(self, cache: Cache, position: int | None = None) -> Look:
        """Look at one frame of each conversation (a cache of B frames) and read the visual token.

        `position` is that of the visual token; by default the one behind everything in the cache.
        """
        query = self.query(len(cache.layers[0][0]))
        token = self.model.connector.token(self.model.look(query, cache))
        return Look(query, token, self._read(token[:, None], position)[:, -1])

    def look_at(self, cache: Cache, frames: Tensor) -> Iterator[Look]:
        """Look at the frames i64 [B, k] of a cache one after the other."""
        for frame in frames.T:
            yield self.look(cache.frames(frame))

    def _read(self, x: Tensor, position: int | None = None) -> Tensor:
        where = None if position is None else torch.tensor([[position]], device=x.device)
        hidden = self.model.llm.base_model(
            inputs_embeds=x, position_ids=where, past_key_values=self.memory, use_cache=True
        )
        self.hidden = hidden.last_hidden_state[:, -1]
        return hidden.last_hidden_state


@torch.no_grad()
def autoregressive(model: "FoveatedVLM", batch: Batch) -> Tensor:
    """The pack's nll f32 [S] with queries from fine tokens; same meaning as `model(batch)`.

    Samples of one shape run together. Raises ValueError for `multi_token` models, which have no query.
    """
    if model.config.visual == "multi_token":
        raise ValueError("a multi_token model has no query to run frame by frame")
    device = batch.tokens.device
    cache = model.encoder.encode_only(batch.frames)
    frame_of_look = batch.frame_of_look
    if frame_of_look is None:
        frame_of_look = torch.arange(len(batch.frames), device=device)
    nll = torch.zeros(len(batch.tokens), device=device)
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for i, size in enumerate(batch.sizes):
        if size.text:
            shapes.setdefault((size.looks, size.text, size.prompt), []).append(i)
    for (looks, text, prompt), numbers in shapes.items():
        words = torch.stack([(batch.text_segment == i).nonzero()[:, 0] for i in numbers])  # [B, text]
        tokens = batch.tokens[words]
        frames = torch.stack([frame_of_look[batch.look_segment == i] for i in numbers])  # [B, looks]
        stream = Stream(model)
        hidden = [stream.words(tokens[:, :prompt])] if prompt else []
        hidden += [look.hidden[:, None] for look in stream.look_at(cache, frames)]
        hidden += [stream.words(tokens[:, prompt:])] if prompt < text else []
        position = text_positions(text, prompt, looks, device)  # the state before a token predicts it
        states = torch.cat(hidden, dim=1)[:, (position - 1).clamp(min=0)]
        scores = model.score(states.flatten(0, 1), tokens.flatten()).view_as(tokens)
        nll[words] = scores * (position > 0)
    return nll
