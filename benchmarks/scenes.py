"""The study of docs/evidence.md on one core: python -m benchmarks.scenes OUT [RUN ...] [--seeds N] [--steps N]

Trains runs of experiments/scenes.yaml, one after the other, seed by seed, and writes OUT/NAME-sSEED.json for each; what
is there is skipped, so the same command resumes. Then OUT/table.md. FOVLM_DATA has the scenes, FOVLM_MODELS the
encoder.

It computes what training computes (tests/test_scenes_study.py compares the losses with those of `FoveatedVLM.forward`),
in a tenth of the time, because of what is special here: the encoder is frozen, so keys and values of all layers come
from a file (OUT/encodings-*.npy, bf16); a scene has one frame and all questions are equally long, so a batch is one
tensor and the language model reads each prompt once. Products with the encoder's weights are in bf16, all else in fp32.

Letters as in `data/packing.py` and `model/encoder.py`: B questions of a batch, T visual tokens, N rows, l layers.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import DynamicCache

from fovlm.config.schema import Experiment, load
from fovlm.data.chat import ChatTokenizer, load_tokenizer
from fovlm.data.dataset import tokenizer_path
from fovlm.data.index import make_index
from fovlm.data.sample_format import read_members
from fovlm.data.shards import find_shards
from fovlm.fileio import write_atomically
from fovlm.media.decode import decode_pictures
from fovlm.model.build import build
from fovlm.model.encoder import Cache, heads, walk_layer
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.modes import POOLED
from fovlm.train import schedule
from fovlm.viz.contact_sheet import Strip, draw_sheet
from fovlm.viz.heatmap import maps

BATCH = 48  # questions of a step
EASY = 0.25  # of them, after the first stage, about a single large picture
HIDDEN = 9  # patches that the test of faithfulness hides
SHOWN = 8  # scenes of the figure
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


def train(experiment: Experiment, scenes: Scenes, model: FoveatedVLM, log: str) -> list[dict[str, Any]]:
    """Train a model -> its validation scores as it goes."""
    looks, optim, steps = Looks(model), experiment.optim, experiment.train.steps or 0
    groups = [{"params": params, "name": name} for name, params in model.groups().items() if params]
    optimizer = torch.optim.AdamW(groups, betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay)
    params = [p for group in groups for p in group["params"]]
    easy, hard = (scenes.questions[name] for name in experiment.data.mixture)
    stage = sum(experiment.data.first.values()) // BATCH
    random = np.random.default_rng(experiment.data.seed)
    orders = [_endless(len(questions), random) for questions in (easy, hard)]
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    begin, busy = time.perf_counter(), time.process_time()
    for step in range(1, steps + 1):
        many = BATCH if step <= stage else round(BATCH * EASY)
        chosen = [easy[next(orders[0])] for _ in range(many)] + [hard[next(orders[1])] for _ in range(BATCH - many)]
        nll, _, _ = looks.nll(scenes.batch(chosen), chosen[0].prompt)
        rates = schedule.rates(optim, step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        optimizer.zero_grad()
        nll.mean().backward()
        torch.nn.utils.clip_grad_norm_(params, optim.clip)
        optimizer.step()
        losses.append(nll.mean().item())
        if step % experiment.train.eval_every == 0 or step == steps:
            times = {"seconds": time.perf_counter() - begin, "processor": time.process_time() - busy}
            curve.append(
                {"step": step, "train": float(np.mean(losses[-20:])), **times, **score(looks, scenes, experiment)}
            )
            short = {name: round(row["loss"], 3) for name, row in curve[-1]["by_source"].items()}
            print(f"{log} {step}/{steps} train {curve[-1]['train']:.3f} {short} {times['seconds']:.0f} s", flush=True)
    return curve


def _endless(count: int, random: np.random.Generator):
    while True:
        yield from random.permutation(count).tolist()


@torch.no_grad()
def score(looks: Looks, scenes: Scenes, experiment: Experiment) -> dict[str, Any]:
    """Loss and accuracy of every validation source, and where the looks land."""
    found = {}
    for name in experiment.data.val:
        sums: dict[str, list[float]] = defaultdict(list)
        questions = scenes.questions[name]
        for start in range(0, len(questions), 96):
            some = questions[start : start + 96]
            batch = scenes.batch(some)
            nll, right, query = looks.nll(batch, some[0].prompt)
            sums["loss"] += nll.tolist()
            sums["accuracy"] += right.float().tolist()
            if looks.model.config.visual != "multi_token" and looks.model.encoder.deep:
                for key, values in pointing(gaze(looks, batch, query), [q.box for q in some], scenes.size).items():
                    sums[key] += values
        found[name] = {key: float(np.mean(values)) for key, values in sums.items()} | {"questions": len(questions)}
    return {"by_source": found}


def gaze(looks: Looks, batch: dict[str, Tensor], query: Tensor) -> Tensor:
    """Where the looks of queries [B, Q] attend: f32 [B, side, side], mean over layers and heads."""
    seen: list[Tensor] = []
    looks.look(looks.model.connector.query_in(query), batch["keys"], seen)
    return maps(torch.stack(seen))


def pointing(grid: Tensor, boxes: list[list[int]], size: int) -> dict[str, list[float]]:
    """Of maps [B, side, side]: is the center of the brightest patch in the box, the share of attention whose patch has
    its center there, and the share of such patches, which is what a look anywhere would score."""
    side = grid.shape[1]
    centers = (torch.arange(side) + 0.5) * size / side
    left, top, right, bottom = torch.tensor(boxes).T[:, :, None]
    inside = ((centers >= top) & (centers <= bottom))[:, :, None] & ((centers >= left) & (centers <= right))[:, None]
    flat, inside = grid.flatten(1), inside.flatten(1)
    return {
        "pointing": inside.gather(1, flat.argmax(1, keepdim=True))[:, 0].float().tolist(),
        "mass": ((flat * inside).sum(1) / flat.sum(1)).tolist(),
        "anywhere": inside.float().mean(1).tolist(),
    }


@torch.no_grad()
def baselines(looks: Looks, scenes: Scenes, source: str) -> dict[str, dict[str, float]]:
    """Pointing of what does not know the question: the encoder's own CLS, and a look at the center."""
    questions, found = scenes.questions[source], {}
    batch, boxes = scenes.batch(questions), [q.box for q in questions]
    seen: list[Tensor] = []
    pixels = scenes.frames(source, [0])
    cls = looks.model.encoder.embed(pixels)[0][0, 0]
    looks.look(cls.float().expand(len(questions), -1), batch["keys"], seen)
    grid = maps(torch.stack(seen))
    side = grid.shape[1]
    far = (torch.arange(side) - (side - 1) / 2) ** 2
    center = torch.exp(-(far[:, None] + far) / (side / 4) ** 2 / 2).expand_as(grid)
    for name, shown in (("CLS", grid), ("center", center)):
        found[name] = {k: float(np.mean(v)) for k, v in pointing(shown, boxes, scenes.size).items()}
    return found


@torch.no_grad()
def faithfulness(looks: Looks, scenes: Scenes, source: str) -> dict[str, float]:
    """The loss when the HIDDEN patches that a look attends to most are painted over, and as many others at random."""
    questions = scenes.questions[source][:96]
    batch, prompt = scenes.batch(questions), questions[0].prompt
    nll, _, query = looks.nll(batch, prompt)
    grid = gaze(looks, batch, query)
    side, random = grid.shape[1], torch.Generator().manual_seed(0)
    top = grid.flatten(1).topk(HIDDEN).indices
    others = torch.rand(grid.flatten(1).shape, generator=random).scatter(1, top, -1.0).topk(HIDDEN).indices
    frames = scenes.frames(source, [q.picture for q in questions])
    found = {"as it is": float(nll.mean())}
    for name, which in (("where it looks", top), ("elsewhere", others)):
        hidden = torch.zeros(grid.flatten(1).shape, dtype=torch.bool).scatter(1, which, True).view(-1, 1, side, side)
        pixels = nnf.interpolate(hidden.float(), frames.shape[-1:] * 2) > 0
        painted = torch.where(pixels, frames.float().mean((2, 3), keepdim=True).to(torch.uint8), frames)
        parts = [encode(looks.model, painted[n : n + 16])[0] for n in range(0, len(painted), 16)]
        found[name] = float(looks.nll(batch | {"keys": torch.cat(parts)}, prompt)[0].mean())
    return found


@torch.no_grad()
def figure(looks: Looks, scenes: Scenes, source: str, path: Path) -> None:
    """SHOWN scenes with their question and answer, and where the look that it steers attends."""
    questions = scenes.questions[source][::4][:SHOWN]
    batch = scenes.batch(questions)
    grid = gaze(looks, batch, looks.nll(batch, questions[0].prompt)[2])
    frames = torch.cat([scenes.frames(source, [q.picture]) for q in questions])
    strips = [
        Strip(frames[n : n + 1], {"": grid[n : n + 1]}, title=q.words.replace("what is in ", "").replace(" ? ", ": "))
        for n, q in enumerate(questions)
    ]
    draw_sheet(strips, path, columns=4, width=9, dpi=100)


def run(name: str, seed: int, steps: int | None, out: Path) -> dict[str, Any]:
    """Train and score one run -> what its file holds."""
    overrides = [f"train.seed={seed}"] + ([f"train.steps={steps}"] if steps else [])
    experiment = load(name, overrides)
    torch.manual_seed(seed)
    model = build(experiment.model)
    model.freeze(experiment.optim.freeze)
    scenes = Scenes(experiment, model, out)
    curve = train(experiment, scenes, model, f"{name}-s{seed}")
    result = {"run": name, "seed": seed, "experiment": experiment.hash, "curve": curve}
    looks, most = Looks(model), experiment.data.val[-1]
    if model.config.visual == "foveated" and experiment.model.question == "before_frames":
        result |= {"baselines": baselines(looks, scenes, most), "faithfulness": faithfulness(looks, scenes, most)}
        figure(looks, scenes, most, out / f"{name}-s{seed}.png")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The last scores of all runs as Markdown: mean over seeds, and the seeds."""
    sides: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        sides[result["run"]].append(result["curve"][-1]["by_source"])
    lines = []
    for what in ("loss", "accuracy", "pointing", "mass"):
        sources = list(next(iter(sides.values()))[0])
        lines += [f"| {what} | {' | '.join(sources)} |", "|---" * (len(sources) + 1) + "|"]
        for name, seeds in sides.items():
            cells = [", ".join(f"{seed[s][what]:.3f}" for seed in seeds) for s in sources if what in seeds[0][s]]
            lines += [f"| {name} | {' | '.join(cells)} |"] if cells else []
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="*", default=["scenes", "scenes_static"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in range(arguments.seeds):
        for name in arguments.runs:
            file = arguments.out / f"{name}-s{seed}.json"
            if not file.exists():
                write_atomically(file, json.dumps(run(name, seed, arguments.steps, arguments.out), indent=1))
    found = [json.loads(file.read_text()) for file in sorted(arguments.out.glob("*-s*.json"))]
    write_atomically(arguments.out / "table.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
