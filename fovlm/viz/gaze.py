"""Where a model looks while it watches a clip, as deployment looks: frame by frame, each look asked for by the last.

    gaze = gaze_of(model, processor, read_clip("cat.mp4", model.config.frame_size), "What does the cat hold?")
    gaze.weights["fine"]    [layers, K, H, N], what each look attends to
    gaze.entropy["fine"]    [K], how spread out it is: 1 is uniform
    gaze.answer

Beside the `fine` looks stand the `coarse` ones, those of the static query. Letters: K looks (one for each frame of a
film; a picture may be looked at several times), H heads, N CLS and patches, S text tokens, Q query width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fovlm.data.packing import PackSize, Sample, collate, interleave
from fovlm.errors import UserError, did_you_mean
from fovlm.media import decode
from fovlm.media.clip import Clip
from fovlm.model.autoregressive import Stream
from fovlm.model.encoder import Cache
from fovlm.model.generation import check_context
from fovlm.model.modes import FRAMES_AT_ONCE
from fovlm.model.modes import MODES as ALL_MODES
from fovlm.viz.answer import inputs_for
from fovlm.viz.heatmap import entropy

MODES = ALL_MODES["foveated"][::-1]  # the first is the default
ANYTHING = "What happens here?"  # asked of a model that was trained with a question ahead of the frames, if nobody asks


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
    question: str  # "" when nothing was asked
    answer: str
    weights: dict[
        str, np.ndarray
    ]  # "coarse", and of foveated models "fine" -> f32 [layers, K, H, N]; CLS, then patches
    entropy: dict[str, np.ndarray]  # the same names -> f32 [K]: mean over layers and heads, over its most, ln N
    tokens: list[Token]  # in the order in which the language model reads them
    clip: str  # its name
    model: str
    mode: str

    @property
    def answered_by(self) -> str:
        """The looks that the answer rests on: the last of `weights`."""
        return list(self.weights)[-1]


@torch.no_grad()
def gaze_of(
    model: Any,
    processor: Any,
    clip: Clip,
    question: str | None = None,
    max_new_tokens: int = 128,
    mode: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    **options: Any,
) -> Gaze:
    """Watch the clip, answer the question (greedily, unless the model's generation config says otherwise), and tell.

    Fine looks are those of deployment; mode `coarse_fine` takes those of the parallel passes, `coarse_only` leaves them
    out, as does a `coarse` model in any mode. `on_progress(done, total)` is called after each look; `options` go to
    `generate` (a streamer, say). Raises UserError for a multi_token model, which has no query, for an unknown mode, and
    when the question does not fit into the context.
    """
    visual = model.config.visual
    if visual == "multi_token":
        raise UserError("a multi_token model sees all of every frame alike: it has no gaze to show")
    mode = mode or MODES[0]
    if mode not in MODES:
        raise UserError(f"mode is {', '.join(MODES)}, not '{mode}'{did_you_mean(mode, MODES)}")
    mode = "coarse_only" if visual == "coarse" else mode
    question = (question or "").strip() or (ANYTHING if model.config.question == "before_frames" else "")

    frames, times, ids, prompt = _shown(model, processor, clip, question)
    number_of = [n for n, again in enumerate(times) for _ in range(again)]  # of the frame of each look
    check_context(model.config, len(number_of), len(ids))
    ids, frames = ids.to(model.device), frames.to(model.device)
    query = _parallel_queries(model, frames[number_of], ids, prompt) if mode == "coarse_fine" else None
    visual_tokens, weights = _watch(model, frames, times, ids[:prompt], mode, query, on_progress)
    options["max_new_tokens"] = max_new_tokens
    new = _answer(model, ids, prompt, visual_tokens, options) if question else []
    seconds = [clip.seconds[n] for n in decode.spread(len(clip.seconds), len(frames))]
    return Gaze(
        frames=frames[number_of].cpu(),
        seconds=[seconds[n] for n in number_of],
        question=question,
        answer=processor.decode(new, skip_special_tokens=True).strip() if new else "",
        weights={name: w.numpy() for name, w in weights.items()},
        entropy={name: entropy(w).mean((0, 2)).numpy() for name, w in weights.items()},
        tokens=_tokens(processor, ids.tolist(), prompt, len(number_of), new, question),
        clip=clip.name,
        model=str(model.config.name_or_path).rstrip("/").split("/")[-1],
        mode=mode,
    )


def _shown(model: Any, processor: Any, clip: Clip, question: str) -> tuple[Tensor, list[int], Tensor, int]:
    """Frames u8 [f, 3, s, s], how often each is looked at, text i64 [S] and how much of it stands ahead of them."""
    if not question:
        times = [model.config.image_frames if clip.still else 1] * len(clip.frames)
        return clip.frames, times, torch.zeros(0, dtype=torch.int64), 0
    inputs = inputs_for(model, processor, clip, question)
    looks = inputs["looks"][0].tolist() if "looks" in inputs else [1] * inputs["frames"].shape[1]
    return inputs["frames"][0], looks, inputs["input_ids"][0], int(inputs["prompt"][0])


def _watch(
    model: Any,
    frames: Tensor,
    times: list[int],
    ahead: Tensor,
    mode: str,
    query: Tensor | None,
    on_progress: Callable[[int, int], None],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Look at the frames -> visual tokens [K, E], attention weights f32 [layers, K, H, N] by name.

    `query` [K, Q] if they are known; else each comes from the language model's state, after the text tokens `ahead`.
    """
    stream, connector = Stream(model), model.connector
    if len(ahead):
        stream.words(ahead[None])
    tokens: list[Tensor] = []
    weights: dict[str, list[Tensor]] = {}
    done = 0
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        again = times[start : start + FRAMES_AT_ONCE]
        cache = model.encoder.encode_only(frames[start : start + FRAMES_AT_ONCE])
        frame_of_look = torch.tensor([n for n, t in enumerate(again) for _ in range(t)], device=frames.device)
        k = len(frame_of_look)
        static = connector.q_static.expand(k, -1)
        weights.setdefault("coarse", []).append(_weights(model, static, cache, frame_of_look))
        if mode == "coarse_only" or query is not None:
            asked = static if query is None else query[done : done + k]
            tokens.append(connector.token(model.look(asked, cache, frame_of_look)))
        else:
            looks = list(stream.look_at(cache, frame_of_look[None]))
            asked = torch.cat([look.query for look in looks])
            tokens += [look.token for look in looks]
        if mode != "coarse_only":
            weights.setdefault("fine", []).append(_weights(model, asked, cache, frame_of_look))
        done += k
        on_progress(done, sum(times))
    return torch.cat(tokens), {name: torch.cat(parts, dim=1) for name, parts in weights.items()}


def _weights(model: Any, query: Tensor, cache: Cache, frame_of_look: Tensor) -> Tensor:
    return model.encoder.look_weights(model.connector.query_in(query), cache, frame_of_look).float().cpu()


def _parallel_queries(model: Any, shown: Tensor, ids: Tensor, prompt: int) -> Tensor:
    """The queries [K, Q] of training's parallel passes over the frames u8 [K, 3, s, s] of each look."""
    sample = Sample("", "", shown.cpu(), len(shown), ids.cpu(), torch.zeros(len(ids)), prompt)
    batch = collate([sample], PackSize(len(shown), len(shown), len(ids), prompt), shown.shape[-1]).to(shown.device)
    return model.looks(batch).queries


def _answer(model: Any, ids: Tensor, prompt: int, visual: Tensor, options: dict[str, Any]) -> list[int]:
    """What the language model's own `generate` says to these tokens, as `FoveatedVLM.generate` asks it.

    That one would watch the clip a second time.
    """
    words = model.llm.get_input_embeddings()(ids)
    x = interleave(words, visual, prompt)[None]
    mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
    room = model.config.context - x.shape[1]
    settings, left = model.settings(room, None, options)
    return model.llm.generate(inputs_embeds=x, attention_mask=mask, generation_config=settings, **left)[0].tolist()


def _tokens(processor: Any, ids: list[int], prompt: int, looks: int, new: list[int], question: str) -> list[Token]:
    """The token stream: text up to `prompt`, the looks, the rest of the text, the answer."""

    def written(token: int) -> str:
        return processor.decode([token], skip_special_tokens=False)

    texts = [written(token) for token in ids]
    bare = ["".join(text.split()) for text in texts]  # some tokenizers have no token for a space
    sought = "".join(question.split())
    start = "".join(bare).find(sought)  # -1 where a letter takes several tokens, none of which can be written alone
    at, words = 0, []
    for text, letters in zip(texts, bare, strict=True):
        asked = 0 <= start < at + len(letters) and at < start + len(sought) and (letters or at > start)
        words.append(Token("question" if asked else "template", text))
        at += len(letters)
    seen = [Token("frame", f"frame {n + 1}", n) for n in range(looks)]
    return [*words[:prompt], *seen, *words[prompt:], *(Token("answer", written(token)) for token in new)]
