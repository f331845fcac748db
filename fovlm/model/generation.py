"""Answers: `generate`, with the arguments of transformers' `generate`.

Every conversation's frames become visual tokens first; then the language model's own `generate` continues from the
embeddings. Mode `autoregressive` makes the tokens frame by frame, as in deployment; the other modes are the parallel
passes of training. Conversations of different lengths are padded on the left, and each gives what it gives alone.

Letters: B conversations, S text tokens, f frames of a conversation, T visual tokens of a look, E language-model width.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from fovlm.data.packing import EMPTY, Sample, collate, interleave
from fovlm.errors import UserError
from fovlm.model.autoregressive import Stream
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.modes import FRAMES_AT_ONCE, NEW_TOKENS, mode_of
from fovlm.model.streaming import FrameStream

if TYPE_CHECKING:
    from fovlm.model.modeling import FoveatedVLM

Progress = Callable[[int, int], None]  # on_progress(frames done, of how many)
Shown = tuple[Sample, list[int]]  # a conversation, and how often each of its frames is looked at


class FoveatedGenerationMixin(GenerationMixin):
    """`generate` and `stream` for FoveatedVLM. (transformers asks for a class whose name ends like this.)"""

    @torch.no_grad()
    def generate(
        self: "FoveatedVLM",
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        looks: Tensor | None = None,
        prompt: Tensor | None = None,
        mode: str | None = None,
        generation_config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
        **options: Any,
    ) -> Any:
        """Answer B conversations, as `FoveatedProcessor` gives them -> the answers' token ids i64 [B, new tokens].

        input_ids, attention_mask i64 [B, S] (padded on the left); frames u8 [B, f, 3, s, s]; looks i64 [B, f], how
        often each frame is looked at (0: padding; default: once); prompt i64 [B], tokens ahead of the frames. `mode` is
        one of MODES. `options` are those of transformers: max_new_tokens (default 256), do_sample, num_beams, streamer
        and so on; `pixel_values` is another name of `frames`. `on_progress(done, total)` is called after each frame in
        mode `autoregressive`. Answers end where the context does. Raises UserError when there is no room for one.
        """
        frames = options.pop("pixel_values", None) if frames is None else frames
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x, mask = self.embed(unpadded(input_ids, mask, frames, looks, prompt), mode, on_progress)
        settings, options = self.settings(self.config.context - x.shape[1], generation_config, options)
        return self.llm.generate(inputs_embeds=x, attention_mask=mask, generation_config=settings, **options)

    def settings(
        self, room: int, given: GenerationConfig | None, options: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The settings of an answer of at most `room` tokens, and the options that are not settings (a streamer)."""
        settings = copy.deepcopy(given or self.generation_config)
        if given is not None:
            # What it leaves open is the model's own, as in transformers: the end tokens above all.
            settings.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        left = settings.update(**options)
        if settings.max_length is None:
            settings.max_new_tokens = min(settings.max_new_tokens or NEW_TOKENS, room)
        return settings, left

    @torch.no_grad()
    def embed(
        self: "FoveatedVLM", samples: list[Shown], mode: str | None = None, on_progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """The language model's input [B, L, E], padded on the left, and its mask i64 [B, L], for the conversations that
        `unpadded` gives. `mode`, `on_progress` and errors as in `generate`."""
        mode = mode_of(mode, self.config.visual)
        for sample, times in samples:
            check_context(self.config, sum(times), len(sample.tokens))
        tokens = self._visual_tokens(samples, mode, on_progress)
        words = self.llm.get_input_embeddings()
        rows = [interleave(words(s.tokens), v, s.prompt) for (s, _), v in zip(samples, tokens, strict=True)]
        longest = max(map(len, rows))
        x = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
        filled = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=x.device)
        return x, filled

    def stream(
        self: "FoveatedVLM",
        frames: Iterable[Any] | None = None,
        processor: Any = None,
        question: str | None = None,
        full: str = "stop",
        reserve: int | None = None,
    ) -> FrameStream:
        """Frames one at a time, and questions at any time: the arguments of `FrameStream`."""
        return FrameStream(self, processor, frames, question, full, reserve)

    def _visual_tokens(
        self: "FoveatedVLM", samples: list[Shown], mode: str, on_progress: Progress | None
    ) -> list[Tensor]:
        """The visual tokens [looks * T, E] of each conversation."""
        if mode == "autoregressive":
            return self._frame_by_frame(samples, on_progress)
        if not any(sum(times) for _, times in samples):
            return [self.llm.get_input_embeddings().weight[:0] for _ in samples]
        T = self.config.tokens_per_look
        flat = [one_frame_a_look(sample, times) for sample, times in samples]
        size = sum((s.size for s in flat), EMPTY)
        batch = collate(flat, self.config.frame_size, T, size=size).to(self.llm.device)
        looks = self.looks(batch, "coarse" if mode == "coarse_only" else None)
        return list(looks.tokens.split([s.looks * T for s in flat]))

    def _frame_by_frame(self: "FoveatedVLM", samples: list[Shown], on_progress: Progress | None) -> list[Tensor]:
        """Conversations of one shape run together, so that none of them is padded."""
        shapes: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for number, (sample, times) in enumerate(samples):
            shapes.setdefault((sample.prompt, tuple(times)), []).append(number)
        found: dict[int, Tensor] = {}
        done, total = 0, sum(len(times) for _, times in shapes)
        for (prompt, shared_times), numbers in shapes.items():
            stream, B = Stream(self), len(numbers)
            if prompt and shared_times:
                stream.words(torch.stack([samples[i][0].tokens[:prompt] for i in numbers]))
            tokens = [torch.zeros(B, 0, self.config.llm_config.hidden_size, device=self.llm.device)]
            clips = torch.stack([samples[i][0].frames for i in numbers], dim=1)  # [f, B, 3, s, s]
            size = max(1, FRAMES_AT_ONCE // B)
            for start in range(0, len(clips), size):
                cache = self.encoder.encode_only(clips[start : start + size].flatten(0, 1).to(self.llm.device))
                for number, count in enumerate(shared_times[start : start + size]):
                    index = torch.arange(number * B, (number + 1) * B, device=self.llm.device)[:, None]
                    looks = stream.look_at(cache, index.expand(-1, count))
                    tokens += [look.token[:, None].float() for look in looks]
                    done += 1
                    if on_progress:
                        on_progress(done, total)
            found |= dict(zip(numbers, torch.cat(tokens, dim=1), strict=True))
        return [found[number] for number in range(len(samples))]


def unpadded(
    input_ids: Tensor, mask: Tensor, frames: Tensor | None, looks: Tensor | None, prompt: Tensor | None
) -> list[Shown]:
    """The conversations of padded rows; arguments as in `generate`. Raises UserError for pixels that are not u8."""
    if frames is not None and frames.dtype != torch.uint8:
        raise UserError(f"frames are u8 pixels from 0 to 255, which the model normalises itself, not {frames.dtype}")
    return [
        _sample(
            input_ids[row][mask[row] == 1],
            None if frames is None else frames[row],
            None if looks is None else looks[row],
            0 if prompt is None else int(prompt[row]),
        )
        for row in range(len(input_ids))
    ]


def _sample(tokens: Tensor, frames: Tensor | None, looks: Tensor | None, prompt: int) -> Shown:
    if frames is None:
        frames = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    times = [1] * len(frames) if looks is None else looks.tolist()
    frames = frames[[n for n, count in enumerate(times) if count]]
    times = [count for count in times if count]
    return Sample("", "", frames, sum(times), tokens, torch.zeros(len(tokens)), prompt if times else 0), times


def one_frame_a_look(sample: Sample, times: list[int]) -> Sample:
    """A sample with every frame as often as it is looked at, which any pack can hold."""
    frames = sample.frames.cpu().repeat_interleave(torch.tensor(times, dtype=torch.int64), dim=0)
    return Sample("", "", frames, len(frames), sample.tokens.cpu(), sample.weight, sample.prompt)


def check_context(config: FoveatedConfig, looks: int, words: int) -> None:
    """Refuse a conversation that leaves no room for an answer. Raises UserError."""
    seen, context = looks * config.tokens_per_look, config.context
    if seen + words >= context:
        raise UserError(
            f"{words} tokens of text and {seen} of frames leave no room for an answer in the context of {context}: "
            "ask a shorter question, or show fewer frames"
        )
