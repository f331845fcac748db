"""The likelihood of several texts about frames that are encoded once.

    encode         frames -> Encoding: everything that the encoder computes
    visual_tokens  a View of an encoding, in one mode -> visual tokens
    score          visual tokens and texts with a common beginning -> the nll of each text's tokens

Modes and controls share the encoding, and texts share the language model's keys and values up to where they differ.
The numbers equal those of `model(batch)` for each text alone.

Letters: F frames, K looks, T tokens of a look, B texts, s tokens of a text, E language-model width, Q query width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from fovlm.data.chat import TokenizedText
from fovlm.data.packing import Sample, collate, interleave, text_positions
from fovlm.model.autoregressive import Stream
from fovlm.model.encoder import Cache
from fovlm.model.modeling import FoveatedVLM


@dataclass
class Encoding:
    """Encoded frames. `static` is what the static query sees in each [F, D], or the pooled tokens [F, T, E]."""

    cache: Cache | None  # None for multi_token
    static: Tensor

    def of(self, start: int, end: int) -> "Encoding":
        """The frames from `start` to `end`."""
        part = slice(start, end)
        return Encoding(self.cache and self.cache.frames(part), self.static[part])


@dataclass
class View:
    """The frame of each look, and the text before them. With `gaze_of`, the queries are those of that view."""

    encoding: Encoding
    looks: Tensor  # i64 [K]
    prompt: Tensor  # i64 [p]
    gaze_of: "View | None" = None


@torch.no_grad()
def encode(model: FoveatedVLM, frames: Tensor, together: int = 32) -> Encoding:
    """Encode frames u8 [F, 3, s, s], F >= 1, `together` at a time."""
    parts = [_encode(model, part) for part in frames.split(together)]
    caches = [part.cache for part in parts if part.cache]
    layers = [
        tuple(torch.cat(tensors) for tensors in zip(*layer, strict=True))
        for layer in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return Encoding(Cache(layers) if caches else None, torch.cat([part.static for part in parts]))


def _encode(model: FoveatedVLM, frames: Tensor) -> Encoding:
    if model.config.visual == "multi_token":
        return Encoding(None, model.pooled(frames))
    return Encoding(*model.encode(frames))


@torch.no_grad()
def visual_tokens(model: FoveatedVLM, view: View | None, mode: str) -> Tensor:
    """The visual tokens [K * T, E] of a view; of None, no tokens."""
    if view is None or not len(view.looks):
        return model.connector.q_static.new_zeros(0, model.config.llm_config.hidden_size)
    encoding = view.encoding
    if encoding.cache is None:
        return encoding.static[view.looks].flatten(0, 1)
    coarse = mode == "coarse_only" or (mode == "coarse_fine" and model.config.query_rounds == 0)
    if coarse or model.config.visual == "coarse":
        return model.connector.token(encoding.static[view.looks])
    queries = (_frame_by_frame if mode == "autoregressive" else _parallel)(model, view.gaze_of or view)
    return model.connector.token(model.look(queries, encoding.cache, view.looks))


def _parallel(model: FoveatedVLM, view: View) -> Tensor:
    """The queries [K, Q] of the parallel passes."""
    K, p = len(view.looks), len(view.prompt)
    blank = torch.zeros(K, 3, 1, 1, dtype=torch.uint8)  # the frames are encoded already
    sample = Sample("", "", blank, K, view.prompt.cpu(), torch.zeros(p), p)
    batch = collate([sample], 1, size=sample.size).to(view.looks.device)
    assert view.encoding.cache is not None
    encoded = (view.encoding.cache, view.encoding.static)
    queries = model.looks(replace(batch, frame_of_look=view.looks), encoded=encoded).queries
    assert queries is not None
    return queries


def _frame_by_frame(model: FoveatedVLM, view: View) -> Tensor:
    """The queries [K, Q] of deployment."""
    stream = Stream(model)
    if len(view.prompt):
        stream.words(view.prompt[None])
    assert view.encoding.cache is not None
    queries = [look.query[0] for look in stream.look_at(view.encoding.cache, view.looks[None])]
    return torch.stack([q.to(queries[-1].dtype) for q in queries])


@torch.no_grad()
def score(model: FoveatedVLM, tokens: Tensor, texts: list[TokenizedText]) -> list[Tensor]:
    """Visual tokens [K * T, E] and B texts around them -> the nll f32 [s] of each text's tokens.

    0 for tokens without weight and for the very first position. The texts' common beginning is computed once. Raises
    ValueError for texts that differ before the visual tokens.
    """
    device, p, K = tokens.device, texts[0].prompt, len(tokens)
    shared = _common_length([text.tokens for text in texts])
    if shared < p:
        raise ValueError("texts that differ before the visual tokens cannot share them")
    embed = model.llm.get_input_embeddings()
    x = interleave(embed(texts[0].tokens[:shared].to(device)), tokens, p)
    memory = DynamicCache(config=model.llm.config)
    hidden = model.llm.base_model(inputs_embeds=x[None], past_key_values=memory, use_cache=True).last_hidden_state[0]
    before = (text_positions(shared, p, K) - 1).clamp(min=0)  # the state before a token predicts it
    states = [hidden[before.to(device)]] * len(texts)
    tails = [len(text.tokens) - shared for text in texts]
    if any(tails):
        rest = torch.zeros(len(texts), max(tails), dtype=torch.int64)
        for row, text in enumerate(texts):
            rest[row, : tails[row]] = text.tokens[shared:]
        memory.batch_repeat_interleave(len(texts))
        read = model.llm.base_model(
            inputs_embeds=embed(rest.to(device)), past_key_values=memory, use_cache=True
        ).last_hidden_state
        previous = torch.cat([hidden[-1:].expand(len(texts), 1, -1), read[:, :-1]], dim=1)
        states = [torch.cat([s, b[:tail]]) for s, b, tail in zip(states, previous, tails, strict=True)]
    first_is_unknown = p > 0 or K == 0
    return [_nll(model, state, text, first_is_unknown) for state, text in zip(states, texts, strict=True)]


def _nll(model: FoveatedVLM, states: Tensor, text: TokenizedText, first_is_unknown: bool) -> Tensor:
    counted = text.weight > 0
    counted[0] &= not first_is_unknown
    out = torch.zeros(len(text.tokens))
    if counted.any():
        where = counted.to(states.device)
        out[counted] = model.score(states[where], text.tokens.to(states.device)[where]).float().cpu()
    return out


def _common_length(rows: list[Tensor]) -> int:
    """How many first tokens all rows share."""
    shortest = min(map(len, rows))
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
    return int(same.long().cumprod(0).sum())
