"""Frame by frame, as in deployment: one look, one token into the language model's cache, the next query.

`autoregressive` scores a pack this way, and `generation.py` sees this way. Unlike the parallel passes of training, each
query here comes from the FINE tokens of the frames before it.
"""

from typing import Any

import torch
from torch import Tensor

from fovlm.data.packing import Batch
from fovlm.model.encoder import Cache
from fovlm.model.kv_cache import ContextCache

Model = Any  # a FoveatedVLM; its module imports this one


class Stream:
    """B conversations that grow in lockstep. `hidden` [B, E] is the language model's last state, None at the start."""

    def __init__(self, model: Model):
        self.model = model
        self.memory = ContextCache(model.llm.config.num_hidden_layers)
        self.hidden: Tensor | None = None

    def words(self, tokens: Tensor) -> Tensor:
        """Read text tokens i64 [B, s] -> the hidden states [B, s, E] behind each."""
        return self._read(self.model.llm.get_input_embeddings()(tokens))

    def look(self, cache: Cache, position: int | None = None) -> Tensor:
        """Look at one frame of each conversation (a cache of B frames) and read what was seen -> hidden [B, E].

        `position` is where the visual token stands; unless told, behind all that is in the cache.
        """
        return self._read(self.see(cache)[:, None], position)[:, -1]

    def see(self, cache: Cache) -> Tensor:
        """The visual token [B, E] of the next look at one frame of each conversation."""
        return self.model.connector.token(self.model.look(self.query(len(cache.layers[0][0])), cache))

    def query(self, conversations: int) -> Tensor:
        """What the next look asks with, [B, Q]: the state so far, q_first before there is any, or always q_static."""
        connector = self.model.connector
        if self.model.config.visual == "coarse":
            return connector.q_static.expand(conversations, -1)
        if self.hidden is None:
            return connector.q_first.expand(conversations, -1)
        return connector.to_query(self.hidden)

    def read(self, visual: Tensor) -> Tensor:
        """Read visual tokens [B, k, E] -> the hidden states behind each."""
        return self._read(visual)

    def _read(self, x: Tensor, position: int | None = None) -> Tensor:
        where = None if position is None else torch.tensor([[position]], device=x.device)
        hidden = self.model.llm.base_model(
            inputs_embeds=x, position_ids=where, past_key_values=self.memory, use_cache=True
        )
        self.hidden = hidden.last_hidden_state[:, -1]
        return hidden.last_hidden_state


@torch.no_grad()
def autoregressive(model: Model, batch: Batch) -> Tensor:
    """The pack's nll f32 [S] with queries from fine tokens; same meaning as `model(batch)`.

    Samples of one shape go together. Raises ValueError for `multi_token` models, which have no query.
    """
    if model.config.visual == "multi_token":
        raise ValueError("a multi_token model has no query to run frame by frame")
    device = batch.tokens.device
    cache = model.encoder.encode_only(batch.frames)
    frame_of_look = batch.frame_of_look
    if frame_of_look is None:
        frame_of_look = torch.arange(len(batch.frames), device=device)
    nll = torch.zeros(len(batch.tokens), device=device)
    for (looks, text, prompt), numbers in _same_shape(batch).items():
        words = torch.stack([(batch.text_segment == i).nonzero()[:, 0] for i in numbers])  # [B, text]
        tokens = batch.tokens[words]
        seen = torch.stack([frame_of_look[batch.look_segment == i] for i in numbers])  # [B, looks]
        stream = Stream(model)
        hidden = [stream.words(tokens[:, :prompt])] if prompt else []
        hidden += [stream.look(cache.frames(seen[:, k]))[:, None] for k in range(looks)]
        hidden += [stream.words(tokens[:, prompt:])] if prompt < text else []
        # Token i stands at i, or behind the looks when it is not part of the prompt; the state before it predicts it.
        stand = torch.arange(text, device=device)
        stand = stand + (stand >= prompt) * looks
        states = torch.cat(hidden, dim=1)[:, (stand - 1).clamp(min=0)]
        scores = model.score(states.flatten(0, 1), tokens.flatten()).view_as(tokens)
        nll[words] = scores * (stand > 0)
    return nll


def _same_shape(batch: Batch) -> dict[tuple[int, int, int], list[int]]:
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, size in enumerate(batch.sizes):
        if size.text:
            groups.setdefault((size.looks, size.text, size.prompt), []).append(i)
    return groups
