"""A model as three ONNX graphs, which see a video frame by frame as `Stream` does.

    encoder   frame u8 [1, 3, s, s] -> cache f32 [2, layers, N, H, d]
    look      hidden f32 [1, E], kind i64 [1], cache -> token f32 [1, E], weights f32 [layers, H, N]
    llm       visual f32 [v, E], words i64 [w], scored i64 [k], memory f32 [n, M]
              -> logits f32 [k, V], hidden f32 [1, E], new f32 [v + w, M]

`kind` is where the query of a look comes from: q_first, q_static, or the language model's hidden state. The language
model reads v visual tokens and then w words behind the n tokens of its memory. It returns their keys and values as
rows, which the caller appends to the memory or drops, the logits at the places `scored` of what it read, and its last
state. v, w, k and n may be 0, but not v + w.

Letters: E width and V vocabulary of the language model, M numbers in a token's keys and values; N rows, H heads and d
head width of the encoder; s pixels of a frame's side. Inside the language model also H and G query and key heads.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface, DynamicCache

from fovlm.errors import UserError, needs
from fovlm.export.runtime import PACKAGES
from fovlm.model import kv_cache
from fovlm.model.encoder import Cache
from fovlm.model.modeling import FoveatedVLM

GRAPHS = ("encoder", "look", "llm")
FIRST, STATIC, HIDDEN = range(3)  # kinds of queries
ATTENTION = "exported_rows"  # the name of `attend` in transformers
CHATTY = ("onnx_ir", "onnxscript", "torch.onnx")
PROTOBUF = 2**31  # bytes in one file; larger graphs have their weights beside them


class Graph(nn.Module):
    """A part of a model."""

    def __init__(self, model: FoveatedVLM):
        super().__init__()
        self.model = model
        self.train(model.training)


class EncoderGraph(Graph):
    def forward(self, frame: Tensor) -> Tensor:
        layers = self.model.encoder.encode_only(frame).layers
        return torch.stack([torch.stack([layer[i][0] for layer in layers]) for i in range(2)])


class LookGraph(Graph):
    def forward(self, hidden: Tensor, kind: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        connector = self.model.connector
        query = torch.where(kind[:, None] == STATIC, connector.q_static, connector.to_query(hidden))
        query = torch.where(kind[:, None] == FIRST, connector.q_first, query)
        layers = Cache([(key[None], value[None]) for key, value in zip(*cache.unbind(0), strict=True)])
        token = connector.token(self.model.look(query, layers))
        return token, self.model.encoder.look_weights(connector.query_in(query), layers)[:, 0]


class LanguageGraph(Graph):
    def forward(self, visual: Tensor, words: Tensor, scored: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        llm = self.model.llm
        x = torch.cat([visual, llm.get_input_embeddings()(words)])
        n, end = memory.shape[0], memory.shape[0] + x.shape[0]  # len() would make constants of them
        config = llm.config
        rows = memory.unflatten(1, (config.num_hidden_layers, 2, config.num_key_value_heads, -1))
        layers = rows.permute(1, 2, 3, 0, 4)  # [layers, 2, G, n, d]
        cache = DynamicCache([(keys[None], values[None]) for keys, values in layers])
        place = torch.arange(n, end)
        state = llm.base_model(
            inputs_embeds=x[None],
            position_ids=place[None],
            attention_mask=(torch.arange(end) <= place[:, None])[None, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
        new = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])[:, :, :, n:]
        return llm.get_output_embeddings()(state[scored]), state[-1:], new.permute(3, 0, 1, 2, 4).flatten(1)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
    """Queries [1, H, s, d] over keys and values [1, G, n, d], mask bool [1, 1, s, n] -> ([1, s, H, d], None).

    Plain products without a copy of the keys for each head that shares them.
    """
    grouped = query[0].unflatten(0, (key.shape[1], -1))  # [G, H / G, s, d]
    scores = grouped.flatten(1, 2) @ key[0].transpose(1, 2) * (options.get("scaling") or key.shape[-1] ** -0.5)
    weights = scores.unflatten(1, grouped.shape[1:3]).masked_fill(~mask[0], torch.finfo(scores.dtype).min).softmax(-1)
    seen = (weights.flatten(1, 2) @ value[0]).unflatten(1, grouped.shape[1:3])
    return seen.flatten(0, 1).transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, attend)


@torch.no_grad()
def write_graphs(model: FoveatedVLM, out: Path) -> None:
    """Write encoder.onnx, look.onnx and llm.onnx of a model in fp32. Raises UserError for models that have no
    frame-by-frame form, and if a package is missing."""
    config, words = model.config, model.llm.config
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if config.visual == "multi_token":
        raise UserError("a multi_token model takes all frames at once: it has no look to export")
    if (kind := model.llm.base_model.rotary_emb.rope_type) in ("dynamic", "longrope"):
        raise UserError(f"rotary positions of type '{kind}' change with the length of the text: no graph can hold them")
    E, d = words.hidden_size, getattr(words, "head_dim", None) or words.hidden_size // words.num_attention_heads
    frame = torch.zeros(1, 3, *2 * (config.frame_size,), dtype=torch.uint8)
    hidden, ids = torch.zeros(1, E), torch.tensor([0, 1, 2])
    memory = torch.zeros(6, 2 * words.num_hidden_layers * words.num_key_value_heads * d)
    read = {"visual": torch.zeros(2, E), "words": ids, "scored": ids[:2], "memory": memory}
    lengths = [{0: Dim(letter)} for letter in "vwkn"]
    rule, model.encoder.attention = model.encoder.attention, "none"  # looks get keys and values
    model.llm.set_attn_implementation(ATTENTION)
    try:
        encoder = EncoderGraph(model)
        look = {"hidden": hidden, "kind": torch.tensor([HIDDEN]), "cache": encoder(frame)}
        _write(out / "encoder.onnx", encoder, {"frame": frame}, ["cache"])
        _write(out / "look.onnx", LookGraph(model), look, ["token", "weights"])
        _write(out / "llm.onnx", LanguageGraph(model), read, ["logits", "hidden", "new"], lengths)
    finally:
        model.encoder.attention = rule
        model.llm.set_attn_implementation(kv_cache.ATTENTION)


def _write(file: Path, graph: Graph, given: dict[str, Tensor], outputs: list[str], lengths: Any = None) -> None:
    with needs("exporting", *PACKAGES), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph, tuple(given.values()), dynamo=True, input_names=list(given), output_names=outputs,
            dynamic_shapes=lengths, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(file), external_data=sum(p.nbytes for p in graph.parameters()) > PROTOBUF)
