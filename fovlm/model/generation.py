"""Answers: `generate`, with the arguments that transformers' `generate` has.

Every conversation's frames become visual tokens first, then the language model's own `generate` goes on from the
embeddings. In mode `autoregressive` the tokens are made frame by frame, as in deployment and as `evaluate.py` scores
it; the other modes are the parallel passes of training. Conversations of different lengths are padded on the left, and
each gives what it gives alone.

Letters: B conversations, S text tokens, f frames of a conversation, T visual tokens of a look, E language-model width.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from fovlm.data.packing import EMPTY, Sample, collate
from fovlm.errors import UserError, did_you_mean
from fovlm.model.autoregressive import Stream
from fovlm.model.encoder import Cache
from fovlm.model.streaming import FrameStream

MODES = {
    "foveated": ("coarse_only", "coarse_fine", "autoregressive"),
    "coarse": ("coarse_only",),
    "multi_token": ("multi_token",),
}  # of each `visual`; the last one is the default, what deployment does
NEW_TOKENS = 256  # unless told
ENCODED = 8  # frames that are encoded at once


class FoveatedGenerationMixin(GenerationMixin):
    """`generate` for FoveatedVLM. (transformers asks for a class whose name ends like this.)"""

    llm: Any
    config: Any
    encoder: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        looks: Tensor | None = None,
        prompt: Tensor | None = None,
        mode: str | None = None,
        generation_config: GenerationConfig | None = None,
        told: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Any:
        """Answer B conversations, as `FoveatedProcessor` gives them -> the answers' token ids i64 [B, new tokens].

        input_ids, attention_mask i64 [B, S] (padded on the left); frames u8 [B, f, 3, s, s]; looks i64 [B, f], how
        often each frame is looked at (0: padding; unless told once); prompt i64 [B], tokens ahead of the frames. `mode`
        is one of MODES. `options` are those of transformers: max_new_tokens (256 unless told), do_sample, num_beams,
        streamer and so on. `told` hears how many frames are seen, of how many, where they are seen one by one. Answers
        end where the context does. Raises UserError when there is no room for one.
        """
        x, mask = self.embed(input_ids, attention_mask, frames, looks, prompt, mode, told)
        settings, options = self.settings(context_of(self.config) - x.shape[1], generation_config, options)
        return self.llm.generate(inputs_embeds=x, attention_mask=mask, generation_config=settings, **options)

    def settings(
        self, room: int, given: GenerationConfig | None, options: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The settings of an answer of at most `room` tokens, and the options that are no settings (a streamer)."""
        settings = copy.deepcopy(given or self.generation_config)
        if given is not None:
            # What it leaves open is the model's own, as transformers has it: the end tokens above all.
            settings.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        left = settings.update(**options)
        if settings.max_length is None:
            settings.max_new_tokens = min(settings.max_new_tokens or NEW_TOKENS, room)
        return settings, left

    @torch.no_grad()
    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        looks: Tensor | None = None,
        prompt: Tensor | None = None,
        mode: str | None = None,
        told: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the language model reads, [B, L, E] padded on the left, and its mask i64 [B, L]. Raises UserError.

        Arguments as in `generate`.
        """
        modes = MODES[self.config.visual]
        if mode is not None and mode not in modes:
            raise UserError(f"mode is {', '.join(modes)} for this model, not '{mode}'{did_you_mean(mode, modes)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        samples = [
            _sample(
                input_ids[row][mask[row] == 1],
                None if frames is None else frames[row],
                None if looks is None else looks[row],
                0 if prompt is None else int(prompt[row]),
            )
            for row in range(len(input_ids))
        ]
        for sample, times in samples:
            check_context(self.config, sum(times), len(sample.tokens))
        tokens = self._visual_tokens(samples, mode or modes[-1], told)
        words = self.llm.get_input_embeddings()
        rows = [
            torch.cat([w[: s.prompt], v.to(w.dtype), w[s.prompt :]])
            for (s, _), v in zip(samples, tokens, strict=True)
            for w in [words(s.tokens)]
        ]
        longest = max(map(len, rows))
        x = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
        kept = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=x.device)
        return x, kept

    def stream(
        self,
        frames: Iterable[Any] | None = None,
        processor: Any = None,
        question: str | None = None,
        full: str = "stop",
        reserve: int | None = None,
    ) -> FrameStream:
        """Frames one at a time, and questions at any time: see `watch.py`, whose arguments these are."""
        return FrameStream(self, processor, frames, question, full, reserve)

    def _visual_tokens(
        self, samples: "list[Shown]", mode: str, told: Callable[[int, int], None] | None
    ) -> list[Tensor]:
        """The visual tokens [looks * T, E] of each conversation."""
        if mode == "autoregressive":
            return self._frame_by_frame(samples, told)
        if not any(sum(times) for _, times in samples):
            return [self.llm.get_input_embeddings().weight[:0] for _ in samples]
        T = self.config.tokens_per_look
        flat = [_one_frame_a_look(sample, times) for sample, times in samples]
        batch = collate(flat, sum((s.size for s in flat), EMPTY), self.config.frame_size, T).to(self.llm.device)
        tokens = self.visual_tokens(batch, "coarse" if mode == "coarse_only" else self.config.visual)
        return list(tokens.split([s.looks * T for s in flat]))

    def _frame_by_frame(self, samples: "list[Shown]", told: Callable[[int, int], None] | None) -> list[Tensor]:
        """Conversations of one shape go together, so that none of them is padded."""
        shapes: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for number, (sample, times) in enumerate(samples):
            shapes.setdefault((sample.prompt, tuple(times)), []).append(number)
        found: dict[int, Tensor] = {}
        done, most = 0, sum(len(looks) for _, looks in shapes)
        for (prompt, looks), numbers in shapes.items():
            stream = Stream(self)
            if prompt and looks:
                stream.words(torch.stack([samples[i][0].tokens[:prompt] for i in numbers]))
            seen = [torch.zeros(len(numbers), 0, self.config.llm_config.hidden_size, device=self.llm.device)]
            pictures = [samples[i][0].frames for i in numbers]
            for cache, again in zip(self._encoded(pictures), looks, strict=True):
                for _ in range(again):
                    token = stream.see(cache)
                    stream.read(token[:, None])
                    seen.append(token[:, None].float())
                done += 1
                if told:
                    told(done, most)
            found |= dict(zip(numbers, torch.cat(seen, dim=1), strict=True))
        return [found[number] for number in range(len(samples))]

    def _encoded(self, pictures: list[Tensor]) -> Any:
        """The caches of frame 0, 1, ... of B clips u8 [f, 3, s, s], each of B frames; few frames at a time."""
        B, f = len(pictures), len(pictures[0])
        together = max(1, ENCODED // B)
        for start in range(0, f, together):
            part = torch.stack([p[start : start + together] for p in pictures], dim=1)  # [frames, B, 3, s, s]
            cache = self.encoder.encode_only(part.flatten(0, 1).to(self.llm.device))
            for number in range(len(part)):
                yield _some(cache, number * B, B)


Shown = tuple[Sample, list[int]]  # a conversation, and how often each of its frames is looked at


def _sample(tokens: Tensor, frames: Tensor | None, looks: Tensor | None, prompt: int) -> Shown:
    if frames is None:
        frames = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    times = [1] * len(frames) if looks is None else looks.tolist()
    frames = frames[[n for n, again in enumerate(times) if again]]
    times = [again for again in times if again]
    return Sample("", "", frames, sum(times), tokens, torch.zeros(len(tokens)), prompt if times else 0), times


def _one_frame_a_look(sample: Sample, times: list[int]) -> Sample:
    """A sample with every frame as often as it is looked at, which any pack can hold."""
    frames = sample.frames.repeat_interleave(torch.tensor(times, device=sample.frames.device), dim=0) if times else None
    shown = sample.frames if frames is None else frames
    return Sample("", "", shown.cpu(), len(shown), sample.tokens.cpu(), sample.weight, sample.prompt)


def _some(cache: Cache, start: int, number: int) -> Cache:
    return cache.frames(slice(start, start + number))


def context_of(config: Any) -> int:
    """Positions that the language model was made for."""
    return int(config.llm_config.max_position_embeddings)


def check_context(config: Any, looks: int, words: int, room: int = 1) -> None:
    """Refuse a conversation that leaves no room for `room` tokens of an answer. Raises UserError."""
    seen, context = looks * config.tokens_per_look, context_of(config)
    if seen + words + room > context:
        raise UserError(
            f"{words} tokens of text and {seen} of frames leave no room for an answer in the context of {context}: "
            "ask a shorter question, or show fewer frames"
        )
