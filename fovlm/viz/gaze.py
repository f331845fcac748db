"""Where a model looks in a clip, as in deployment: frame by frame, with each query from the look before.

    gaze = gaze_of(model, processor, read_clip("cat.mp4", model.config.frame_size), "What does the cat hold?")
    gaze.weights["fine"]    [layers, K, H, N], the attention of each look
    gaze.entropy["fine"]    [K], 1 is uniform
    gaze.answer

Beside the `fine` looks are the `coarse` ones, those of the static query. Letters: K looks (one per frame of a video; a
picture may be looked at several times), H heads, N CLS and patches, S text tokens, Q query width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fovlm.data.packing import Sample, collate, interleave
from fovlm.errors import UserError
from fovlm.media import decode
from fovlm.media.clip import Clip
from fovlm.model.autoregressive import Stream
from fovlm.model.generation import check_context
from fovlm.model.modes import FRAMES_AT_ONCE, mode_of
from fovlm.viz.answer import inputs_for
from fovlm.viz.heatmap import entropy

if TYPE_CHECKING:
    from fovlm.model.modeling import FoveatedVLM

QUESTION = "What happens here?"  # where a model needs one before the frames and none is given

Weights = dict[str, Tensor]  # "coarse" and, of foveated models, "fine" -> attention f32 [layers, K, H, N]


@dataclass
class Token:
    """One token as the language model reads it. kind: `template` | `question` | `frame` | `answer`."""

    kind: str
    text: str
    look: int = -1  # the number of a frame token's look


@dataclass
class Gaze:
    """One model's looks at one clip, for one question."""

    frames: Tensor  # u8 [K, 3, s, s]: what each look looks at
    seconds: list[float]  # [K]: when it is on screen
    question: str  # "" if there is none
    answer: str
    weights: dict[str, np.ndarray]  # as in Weights; N: CLS, then the patches by row
    tokens: list[Token]  # in the order in which the language model reads them
    clip: str  # its name
    model: str
    mode: str

    @property
    def entropy(self) -> dict[str, np.ndarray]:
        """The entropy of each look f32 [K], as in `heatmap.entropy`, mean over layers and heads, by name."""
        return {name: entropy(weights).mean((0, 2)).numpy() for name, weights in self.weights.items()}


@torch.no_grad()
def gaze_of(
    model: "FoveatedVLM",
    processor: Any,
    clip: Clip,
    question: str | None = None,
    max_new_tokens: int = 128,
    mode: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Gaze:
    """The model's looks at a clip and its answer to the question.

    Fine looks are those of deployment by default, of the parallel passes in mode `coarse_fine`, and absent in
    `coarse_only` and for a `coarse` model. `on_progress(done, total)` counts looks; `options` are those of `generate`
    (a streamer, say). Raises UserError for a multi_token model, which has no query, for an unknown mode, and if the
    question does not fit into the context.
    """
    if model.config.visual == "multi_token":
        raise UserError("a multi_token model has no gaze to show: it reads all patches of every frame alike")
    mode = mode_of(mode, model.config.visual)
    question = (question or "").strip() or (QUESTION if model.config.question == "before_frames" else "")

    frames, times, ids, prompt = _inputs(model, processor, clip, question)
    frame_of_look = torch.tensor([n for n, again in enumerate(times) for _ in range(again)])
    check_context(model.config, len(frame_of_look), len(ids))
    ids, frames = ids.to(model.device), frames.to(model.device)
    if mode == "autoregressive":
        looks, weights = _frame_by_frame(model, frames, frame_of_look, ids[:prompt], on_progress)
    else:
        looks, weights = _parallel(model, frames[frame_of_look], ids, prompt, mode)
        on_progress(len(looks), len(looks))
    options["max_new_tokens"] = max_new_tokens
    new = _answer(model, ids, prompt, looks, options) if question else []
    seconds = [clip.seconds[n] for n in decode.spread(len(clip.seconds), len(frames))]
    return Gaze(
        frames=frames[frame_of_look].cpu(),
        seconds=[seconds[n] for n in frame_of_look.tolist()],
        question=question,
        answer=processor.decode(new, skip_special_tokens=True).strip() if new else "",
        weights={name: w.numpy() for name, w in weights.items()},
        tokens=_tokens(processor, ids.tolist(), prompt, len(frame_of_look), new, question),
        clip=clip.name,
        model=str(model.config.name_or_path).rstrip("/").split("/")[-1],
        mode=mode,
    )


def _inputs(model: Any, processor: Any, clip: Clip, question: str) -> tuple[Tensor, list[int], Tensor, int]:
    """Frames u8 [f, 3, s, s], the number of looks at each, text i64 [S] and how many of its tokens are before them."""
    if not question:
        times = [model.config.image_frames if clip.still else 1] * len(clip.frames)
        return clip.frames, times, torch.zeros(0, dtype=torch.int64), 0
    inputs = inputs_for(model, processor, clip, question)
    looks = inputs["looks"][0].tolist() if "looks" in inputs else [1] * inputs["frames"].shape[1]
    return inputs["frames"][0], looks, inputs["input_ids"][0], int(inputs["prompt"][0])


def _frame_by_frame(
    model: Any, frames: Tensor, frame_of_look: Tensor, prefix: Tensor, on_progress: Callable[[int, int], None]
) -> tuple[Tensor, Weights]:
    """Visual tokens [K, E] and attention weights, with each query from the language model's state so far.

    `prefix` are the text tokens before the frames.
    """
    stream, tokens, done = Stream(model), [], 0
    weights: dict[str, list[Tensor]] = {"coarse": [], "fine": []}
    if len(prefix):
        stream.words(prefix[None])
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        cache = model.encoder.encode_only(frames[start : start + FRAMES_AT_ONCE])
        here = (frame_of_look >= start) & (frame_of_look < start + FRAMES_AT_ONCE)
        where = (frame_of_look[here] - start).to(frames.device)
        looks = list(stream.look_at(cache, where[None]))
        tokens += [look.token for look in looks]
        queries = {"coarse": _static(model, len(looks)), "fine": torch.cat([look.query for look in looks])}
        for name, query in queries.items():
            weights[name].append(model.look_weights(query, cache, where).cpu())
        done += len(looks)
        on_progress(done, len(frame_of_look))
    return torch.cat(tokens), {name: torch.cat(parts, dim=1) for name, parts in weights.items()}


def _parallel(model: Any, frames: Tensor, ids: Tensor, prompt: int, mode: str) -> tuple[Tensor, Weights]:
    """The same with the parallel passes of training, or in mode `coarse_only` with the static query; a frame a look."""
    sample = Sample("", "", frames.cpu(), len(frames), ids.cpu(), torch.zeros(len(ids)), prompt)
    batch = collate([sample], frames.shape[-1], size=sample.size).to(frames.device)
    looks = model.looks(batch, "coarse" if mode == "coarse_only" else None)
    queries = {"coarse": _static(model, len(frames))} | ({"fine": looks.queries} if mode == "coarse_fine" else {})
    return looks.tokens, {name: model.look_weights(query, looks.cache).cpu() for name, query in queries.items()}


def _static(model: Any, looks: int) -> Tensor:
    return model.connector.q_static.expand(looks, -1)


def _answer(model: Any, ids: Tensor, prompt: int, visual: Tensor, options: dict[str, Any]) -> list[int]:
    """The answer of `FoveatedVLM.generate`, without looking at the clip a second time."""
    x = interleave(model.llm.get_input_embeddings()(ids), visual, prompt)[None]
    mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
    settings, left = model.settings(model.config.context - x.shape[1], None, options)
    return model.llm.generate(inputs_embeds=x, attention_mask=mask, generation_config=settings, **left)[0].tolist()


def _tokens(processor: Any, ids: list[int], prompt: int, looks: int, new: list[int], question: str) -> list[Token]:
    """The tokens in order: text up to `prompt`, the looks, the rest of the text, the answer."""

    def decoded(token: int) -> str:
        return processor.decode([token], skip_special_tokens=False)

    texts = [decoded(token) for token in ids]
    bare = ["".join(text.split()) for text in texts]  # some tokenizers have no token for a space
    sought = "".join(question.split())
    start = "".join(bare).find(sought)  # -1 where a letter takes several tokens, which cannot be decoded alone
    at, words = 0, []
    for text, letters in zip(texts, bare, strict=True):
        asked = 0 <= start < at + len(letters) and at < start + len(sought) and (letters or at > start)
        words.append(Token("question" if asked else "template", text))
        at += len(letters)
    frames = [Token("frame", f"frame {n + 1}", n) for n in range(looks)]
    return [*words[:prompt], *frames, *words[prompt:], *(Token("answer", decoded(token)) for token in new)]
