"""The fast path of the study of scenes: stored encodings, and looks over them (`benchmarks/scenes.py` says why).

Letters as in `data/packing.py` and `model/encoder.py`: B questions of a batch, T visual tokens, N rows, l layers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import DynamicCache

from fovlm.config.schema import Experiment
from fovlm.data.chat import ChatTokenizer, load_tokenizer
from fovlm.data.dataset import tokenizer_path
from fovlm.data.index import make_index
from fovlm.data.sample_format import read_members
from fovlm.data.shards import find_shards
from fovlm.media.decode import decode_pictures
from fovlm.model.encoder import Cache, heads, walk_layer
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.modes import POOLED

HALF = torch.bfloat16


@dataclass
class Question:
    """One question about a picture, which is a row of its source's encodings."""

    source: str
    picture: int
    tokens: Tensor  # i64 [s]
    weight: Tensor  # f32 [s]
    prompt: int
    box: list[int]  # of the asked object, in pixels
    words: str


class Scenes:
    """The questions of an experiment's sources, and the encodings of their pictures, which are made once."""

    def __init__(self, experiment: Experiment, model: FoveatedVLM, out: Path):
        data = experiment.data
        tokenizer = load_tokenizer(tokenizer_path(experiment))
        chat = ChatTokenizer(tokenizer, experiment.model.question, data.loss_on, data.max_tokens)
        self.questions: dict[str, list[Question]] = {}
        self.jpegs: dict[str, list[bytes]] = {}
        self.encodings: dict[str, np.ndarray] = {}
        self.features: dict[str, np.ndarray] = {}
        self.size = experiment.model.frame_size
        for name in [*data.mixture, *data.val]:
            self.questions[name], self.jpegs[name] = _read(name, data.sources[name].shards, chat)
            self._encode(name, model, out)

    def frames(self, source: str, pictures: list[int]) -> Tensor:
        """u8 [n, 3, s, s]."""
        return decode_pictures([("jpg", self.jpegs[source][n]) for n in pictures], self.size)

    @torch.no_grad()
    def _encode(self, name: str, model: FoveatedVLM, out: Path) -> None:
        """Keys and values bf16 [pictures, l, 2, H, N, d], and the final features bf16 [pictures, N, D]."""
        files = [out / f"encodings-{name}.npy", out / f"features-{name}.npy"]
        if not all(file.exists() for file in files):
            count = len(self.jpegs[name])
            parts = [encode(model, self.frames(name, list(range(n, min(n + 16, count))))) for n in range(0, count, 16)]
            for file, arrays in zip(files, zip(*parts, strict=True), strict=True):
                np.save(file.with_suffix(".part.npy"), torch.cat(arrays).view(torch.int16).numpy())
                file.with_suffix(".part.npy").rename(file)
        self.encodings[name], self.features[name] = (np.load(file, mmap_mode="r") for file in files)

    def batch(self, questions: list[Question]) -> dict[str, Tensor]:
        """The tensors of questions of one length."""
        keys, features = (
            torch.from_numpy(np.stack([arrays[q.source][q.picture] for q in questions])).view(HALF)
            for arrays in (self.encodings, self.features)
        )
        tokens, weight = (torch.stack([getattr(q, name) for q in questions]) for name in ("tokens", "weight"))
        return {"tokens": tokens, "weight": weight, "keys": keys, "features": features}


def _read(name: str, pattern: str, chat: ChatTokenizer) -> tuple[list[Question], list[bytes]]:
    questions: list[Question] = []
    jpegs: list[bytes] = []
    for path in find_shards(name, pattern):
        index, data = make_index(path), path.read_bytes()
        for row in range(len(index)):
            at = int(index.offset[row])
            files = {m.extension: b for m, b in read_members(data[at : at + int(index.length[row])]).items()}
            record = json.loads(files["json"])
            for asked in record["conversations"]:
                text = chat.text(asked, None, frames=True)
                box = record["objects"][asked["asked"]]["boxes"][asked["frame"]]
                words = f"{asked['user']} {asked['assistant']}"
                questions.append(Question(name, len(jpegs), text.tokens, text.weight, text.prompt, box, words))
            jpegs.append(files["jpg"])
    return questions, jpegs


@torch.no_grad()
def encode(model: FoveatedVLM, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Frames u8 [F, 3, s, s] -> keys and values bf16 [F, l, 2, H, N, d], final features bf16 [F, N, D]."""
    encoder, keys = model.encoder, []
    with torch.autocast("cpu", HALF):
        x, rotary = encoder.embed(frames)
        for layer in encoder.layers:
            x, cached = walk_layer(encoder.family, layer, x, x.shape[1], encoder.head_width, False, False, rotary)
            keys.append(torch.stack([part.transpose(1, 2).to(HALF) for part in cached], 1))
        return torch.stack(keys, 1), encoder.family.norm(encoder.backbone)(x).to(HALF)


class Looks:
    """`Encoder.look` over encodings in bf16: products in bf16, the residual stream in fp32."""

    def __init__(self, model: FoveatedVLM):
        self.model, encoder = model, model.encoder
        self.blocks = [encoder.family.block(layer) for layer in encoder.layers]
        linears = [(b.query, b.out, b.mlp.fc1, b.mlp.fc2) for b in self.blocks]
        self.weights = [[(m.weight.detach().to(HALF), m.bias.detach().to(HALF)) for m in four] for four in linears]

    def look(self, x: Tensor, keys: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """Looks f32 [B, D] over [B, l, 2, H, N, d] -> f32 [B, D]; `seen` gets attention [B, H, N] of each layer."""
        H, d = keys.shape[3], keys.shape[5]
        for n, (block, (query, out, up, down)) in enumerate(zip(self.blocks, self.weights, strict=True)):
            q = nnf.linear(block.norm1(x).to(HALF), *query).view(len(x), H, 1, d)
            share = ((q @ keys[:, n, 0].transpose(2, 3)).float() * d**-0.5).softmax(-1)
            if seen is not None:
                seen.append(share[:, :, 0])
            x = x + block.scale1(nnf.linear((share.to(HALF) @ keys[:, n, 1]).flatten(1), *out).float())
            x = x + block.scale2(nnf.linear(nnf.gelu(nnf.linear(block.norm2(x).to(HALF), *up)), *down).float())
        return self.model.encoder.family.norm(self.model.encoder.backbone)(x)

    def nll(self, batch: dict[str, Tensor], prompt: int, visual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(nll f32 [B] an answer token, whether all of them are the likeliest bool [B], the queries [B, Q]).

        `visual` [B, T, E] replaces the visual tokens.
        """
        model, connector, tokens = self.model, self.model.connector, batch["tokens"]
        words = model.llm.get_input_embeddings()(tokens)
        memory = DynamicCache()
        count = len(tokens)
        query = connector.q_static if model.config.visual == "coarse" else connector.q_first
        query = query.expand(count, -1)
        if prompt:
            hidden = self.read(words[:, :prompt], memory)
            query = connector.to_query(hidden[:, -1]) if model.config.visual == "foveated" else query
        if visual is None:
            visual = self.visual(batch, query)
        hidden = self.read(torch.cat([visual, words[:, prompt:]], 1), memory)
        logits = model.llm.get_output_embeddings()(hidden[:, visual.shape[1] - 1 : -1]).float()
        target, weight = tokens[:, prompt:], batch["weight"][:, prompt:]
        nll = nnf.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        right = ((logits.argmax(-1) == target) | (weight == 0)).all(1)
        return (nll * weight).sum(1) / weight.sum(1), right, query

    def visual(self, batch: dict[str, Tensor], query: Tensor) -> Tensor:
        """The visual tokens [B, T, E] of queries [B, Q]."""
        model = self.model
        if model.config.visual == "multi_token":
            side = math.isqrt(batch["features"].shape[1])
            grid = batch["features"][:, model.encoder.prefix :].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
            return model.connector.token(nnf.adaptive_avg_pool2d(grid, POOLED).flatten(2).transpose(1, 2))
        start = model.connector.query_in(query)
        if model.encoder.deep:
            return model.connector.token(self.look(start, batch["keys"]))[:, None]
        features = heads(batch["features"].float(), model.encoder.head_width)
        return model.connector.token(model.encoder.look(start, Cache([(features, features)])))[:, None]

    def read(self, x: Tensor, memory: DynamicCache) -> Tensor:
        """The language model over [B, m, E] behind what it has read -> [B, m, E]."""
        return self.model.llm.base_model(inputs_embeds=x, past_key_values=memory, use_cache=True).last_hidden_state
