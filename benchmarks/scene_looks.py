"""The fast path of the study of scenes: stored encodings, and looks over them (`benchmarks/scenes.py` says why).

Letters as in `data/packing.py` and `model/encoder.py`: B questions of a batch, F frames of each, T visual tokens of a
frame, N rows, l layers.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase

from fovlm.config.schema import Experiment
from fovlm.data.chat import ChatTokenizer
from fovlm.data.index import make_index
from fovlm.data.sample_format import read_members
from fovlm.data.shards import find_shards
from fovlm.data.tokenizers import open_tokenizer
from fovlm.media.decode import decode_pictures
from fovlm.model.encoder import Cache, Encoder, LayerCache, heads, walk_layer
from fovlm.model.modeling import FoveatedVLM

HALF = torch.bfloat16


@dataclass
class Question:
    """One question about a clip of `frames` frames, the first of which is row `picture` of its source's encodings."""

    source: str
    picture: int
    frames: int
    frame: int  # the asked one
    tokens: Tensor  # i64 [s]
    weight: Tensor  # f32 [s]
    prompt: int
    box: list[int]  # of the asked object in the asked frame, in pixels
    words: str


class Scenes:
    """The questions of an experiment's sources, and the encodings of their pictures, which are made once."""

    def __init__(self, experiment: Experiment, model: FoveatedVLM, out: Path):
        data = experiment.data
        tokenizer = open_tokenizer(experiment)
        self.questions: dict[str, list[Question]] = {}
        self.jpegs: dict[str, list[bytes]] = {}
        self.stored: dict[str, np.ndarray] = {}
        self.size = experiment.model.frame_size
        self.deep = model.config.visual != "multi_token" and model.config.deep_query
        self.trained = None if "encoder" in experiment.optim.freeze else model
        for name in [*data.mixture, *data.val]:
            shards = data.sources[name].shards
            self.questions[name], self.jpegs[name] = read_questions(name, shards, experiment, tokenizer)
            if not self.trained:
                self._encode(name, Path(shards).parent.name, model, out)

    def frames(self, source: str, pictures: list[int]) -> Tensor:
        """u8 [n, 3, s, s]."""
        return decode_pictures([("jpg", self.jpegs[source][n]) for n in pictures], self.size)

    @torch.no_grad()
    def _encode(self, name: str, folder: str, model: FoveatedVLM, out: Path) -> None:
        """Final features bf16 [frames, N, D] and, for deep looks, keys and values bf16 [frames, l, 2, H, N, d]."""
        files = [out / f"{kind}-{folder}.npy" for kind in ("features", "encodings")[: 1 + self.deep]]
        if not all(file.exists() for file in files):
            count = len(self.jpegs[name])
            parts = [file.with_suffix(".part.npy") for file in files]
            arrays: list[np.ndarray] = []
            for n in range(0, count, 16):
                found = encode(model, self.frames(name, list(range(n, min(n + 16, count)))))
                arrays = arrays or [
                    np.lib.format.open_memmap(part, "w+", np.int16, (count, *one.shape[1:]))
                    for part, one in zip(parts, found, strict=False)
                ]
                for array, one in zip(arrays, found, strict=False):
                    array[n : n + 16] = one.view(torch.int16).numpy()
            for part, file in zip(parts, files, strict=True):
                part.rename(file)
        self.stored[name] = np.load(files[-1], mmap_mode="r")

    def batches(self, questions: list[Question]) -> list[dict[str, Any]]:
        """The tensors of questions with as many frames and equally long prompts: `seen` [B, F, ...] is what looks
        attend to. Tokens are padded at their end, where they have no weight."""
        groups: dict[tuple[int, int], list[Question]] = {}
        for q in questions:
            groups.setdefault((q.frames, q.prompt), []).append(q)
        return [self._batch(group) for group in groups.values()]

    def _batch(self, questions: list[Question]) -> dict[str, Any]:
        tokens = pad_sequence([q.tokens for q in questions], batch_first=True)
        weight = pad_sequence([q.weight for q in questions], batch_first=True)
        frame = torch.tensor([q.frame for q in questions])
        boxes = torch.tensor([q.box for q in questions])
        clips = torch.tensor([q.picture for q in questions])
        shown = {"seen": self._seen(questions), "frame": frame, "boxes": boxes, "clips": clips}
        return {"tokens": tokens, "weight": weight, "prompt": questions[0].prompt, **shown}

    def _seen(self, questions: list[Question]) -> Tensor:
        """Encodings bf16 [B, F, ...] of frames: from the file, or from an encoder that is trained."""
        if not self.trained:
            seen = np.stack([self.stored[q.source][q.picture : q.picture + q.frames] for q in questions])
            return torch.from_numpy(seen).view(HALF)
        clips = list(dict.fromkeys((q.source, q.picture) for q in questions))
        frames = [self.frames(source, list(range(n, n + questions[0].frames))) for source, n in clips]
        seen = encode(self.trained, torch.cat(frames))[self.deep].unflatten(0, (len(clips), -1))
        return seen[[clips.index((q.source, q.picture)) for q in questions]]


def read_questions(
    name: str, pattern: str, experiment: Experiment, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Question], list[bytes]]:
    """The questions of a source's shards, and the JPEGs of their frames."""
    data = experiment.data
    chat = ChatTokenizer(tokenizer, experiment.model.question, data.loss_on, data.max_tokens)
    questions: list[Question] = []
    jpegs: list[bytes] = []
    for path in find_shards(name, pattern):
        index, data = make_index(path), path.read_bytes()
        for row in range(len(index)):
            at = int(index.offset[row])
            files = {m.extension: b for m, b in read_members(data[at : at + int(index.length[row])]).items()}
            record = json.loads(files["json"])
            pictures = [files[extension] for extension in sorted(files) if extension.endswith("jpg")]
            for asked in record["conversations"]:
                text = chat.text(asked, None, frames=True)
                box = record["objects"][asked["asked"]]["boxes"][asked["frame"]]
                shown = (len(jpegs), len(pictures), asked["frame"])
                words = f"{asked['user']} {asked['assistant']}"
                questions.append(Question(name, *shown, text.tokens, text.weight, text.prompt, box, words))
            jpegs += pictures
    return questions, jpegs


def walk(encoder: Encoder, frames: Tensor) -> Iterator[tuple[Tensor, LayerCache]]:
    """Frames u8 [F, 3, s, s] -> behind each layer the rows [F, N, D], and its keys and values."""
    x, rotary = encoder.embed(frames)
    for layer in encoder.layers:
        x, cached = walk_layer(encoder.family, layer, x, x.shape[1], encoder.head_width, False, False, rotary)
        yield x, cached


def encode(model: FoveatedVLM, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Frames u8 [F, 3, s, s] -> final features bf16 [F, N, D], keys and values bf16 [F, l, 2, H, N, d]."""
    encoder = model.encoder
    with torch.autocast("cpu", HALF):
        rows, cached = zip(*walk(encoder, frames), strict=True)
        keys = [torch.stack([part.transpose(1, 2).to(HALF) for part in parts], 1) for parts in cached]
        return encoder.family.norm(encoder.backbone)(rows[-1]).to(HALF), torch.stack(keys, 1)


class Looks:
    """`Encoder.look` over encodings in bf16: products in bf16, the residual stream in fp32. `half`: the language model
    computes in bf16 too."""

    def __init__(self, model: FoveatedVLM, half: bool = False):
        self.model, self.half, encoder = model, half, model.encoder
        self.blocks = [encoder.family.block(layer) for layer in encoder.layers]
        trained = any(parameter.requires_grad for parameter in encoder.parameters())
        self.weights = None if trained else self._weights()

    def _weights(self) -> list[list[tuple[Tensor, Tensor]]]:
        linears = [(b.query, b.out, b.mlp.fc1, b.mlp.fc2) for b in self.blocks]
        return [[(m.weight.to(HALF), m.bias.to(HALF)) for m in four] for four in linears]

    def look(self, x: Tensor, keys: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """Looks f32 [B, D] over [B, l, 2, H, N, d] -> f32 [B, D]; `seen` gets attention [B, H, N] of each layer."""
        H, d = keys.shape[3], keys.shape[5]
        weights = self.weights or self._weights()
        for n, (block, (query, out, up, down)) in enumerate(zip(self.blocks, weights, strict=True)):
            q = nnf.linear(block.norm1(x).to(HALF), *query).view(len(x), H, 1, d)
            share = ((q @ keys[:, n, 0].transpose(2, 3)).float() * d**-0.5).softmax(-1)
            if seen is not None:
                seen.append(share[:, :, 0])
            x = x + block.scale1(nnf.linear((share.to(HALF) @ keys[:, n, 1]).flatten(1), *out).float())
            x = x + block.scale2(nnf.linear(nnf.gelu(nnf.linear(block.norm2(x).to(HALF), *up)), *down).float())
        return self.model.encoder.family.norm(self.model.encoder.backbone)(x)

    def nll(
        self, batch: dict[str, Any], rounds: int | None = None, gaze_of: list[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(nll f32 [B] an answer token, whether all of them are the likeliest bool [B], the queries [B, F, Q]).

        `rounds` of queries instead of the model's own; as many as frames are frame by frame, as deployed. Frames
        are looked at with the queries of the questions `gaze_of` [B] instead of their own.
        """
        model, tokens, prompt = self.model, batch["tokens"], batch["prompt"]
        embed, memory = model.llm.get_input_embeddings(), DynamicCache()
        B, F = batch["seen"].shape[:2]
        state = None
        if prompt:  # questions repeat: each is read once
            asked, which = tokens[:, :prompt].unique(dim=0, return_inverse=True)
            state = self.read(embed(asked), memory)[which, -1]
            memory.batch_select_indices(which)
        query = model.connector.q_static.expand(B, F, -1)
        steered = model.config.visual == "foveated" and F > 0
        blank = embed(tokens[:, :1])  # of one frame, whose query no visual token comes before
        visual = self.visual(batch["seen"], query) if F > 1 or not steered else blank
        for _ in range((model.config.query_rounds if rounds is None else rounds) if steered else 0):
            query = self.queries(visual[:, :-1], state, memory)
            visual = self.visual(batch["seen"], query if gaze_of is None else query[gaze_of])
        target, weight = tokens[:, prompt:], batch["weight"][:, prompt:]
        hidden = self.read(torch.cat([visual, embed(target)], 1), memory)
        before = hidden[:, :1] * 0 if state is None else state[:, None]  # without frames, the prompt's last state
        hidden = torch.cat([before, hidden], 1)[:, visual.shape[1] : -1]
        counts = weight > 0
        with torch.autocast("cpu", HALF, enabled=self.half):
            logits = model.llm.get_output_embeddings()(hidden[counts]).float()
        nll, wrong = torch.zeros_like(weight), torch.zeros_like(counts)
        nll[counts] = nnf.cross_entropy(logits, target[counts], reduction="none")
        wrong[counts] = logits.argmax(-1) != target[counts]
        return (nll * weight).sum(1) / weight.sum(1), ~wrong.any(1), query

    def queries(self, visual: Tensor, state: Tensor | None, memory: DynamicCache) -> Tensor:
        """The queries [B, F, Q] of all looks, from the `state` [B, E] ahead of them and `visual` [B, F - 1, E]."""
        connector, B = self.model.connector, len(visual)
        first = connector.q_first.expand(B, -1) if state is None else connector.to_query(state)
        if not visual.shape[1]:
            return first[:, None]
        later = connector.to_query(self.read(visual, memory))
        memory.crop(-visual.shape[1])
        return torch.cat([first[:, None], later], 1)

    def visual(self, seen: Tensor, query: Tensor) -> Tensor:
        """The visual tokens [B, F * T, E] of queries [B, F, Q]."""
        model = self.model
        B, F = seen.shape[:2]
        seen, query = seen.flatten(0, 1), query.flatten(0, 1)
        if model.config.visual == "multi_token":
            side = math.isqrt(seen.shape[1])
            grid = seen[:, model.encoder.prefix :].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
            found = nnf.adaptive_avg_pool2d(grid, model.config.pooled).flatten(2).transpose(1, 2)
        elif model.encoder.deep:
            found = self.look(model.connector.query_in(query), seen)
        else:
            features = heads(seen.float(), model.encoder.head_width)
            found = model.encoder.look(model.connector.query_in(query), Cache([(features, features)]))
        return model.connector.token(found.unflatten(0, (B, F)).flatten(1, -2))

    def read(self, x: Tensor, memory: DynamicCache) -> Tensor:
        """The language model over [B, m, E] behind what it has read -> [B, m, E]."""
        with torch.autocast("cpu", HALF, enabled=self.half):
            read = self.model.llm.base_model(inputs_embeds=x, past_key_values=memory, use_cache=True)
        return read.last_hidden_state.float()
