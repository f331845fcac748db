"""`model.stream`: watch frames one at a time, and answer questions at any time.

A frame is encoded, looked at with the query from the language model's state, and becomes one token of its cache;
nothing else of it is stored. A question is answered on top of the cache and then forgotten: later states are bit for
bit what they would have been without it.

When the context is full the stream stops with an error, or slides (`full="slide"`): the newest frame takes the place of
the oldest. Positions keep counting, so the distances between frames stay the same; the words ahead of the frames, if
any, are rotated to positions right before the oldest remaining frame. A remaining frame still carries what it attended
to when it was read, dropped frames included (as in StreamingLLM, arXiv 2309.17453, which also keeps the first tokens).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fovlm.data.chat import conversation
from fovlm.errors import UserError, did_you_mean
from fovlm.model.autoregressive import Stream
from fovlm.model.encoder import Cache

if TYPE_CHECKING:
    from fovlm.model.modeling import FoveatedVLM

RESERVE = 512  # tokens reserved for a question and its answer; at most half of the context


class FrameStream:
    """One video, frame by frame. `for count in stream` sees `frames` one by one; `see` takes a frame from elsewhere.

    `question` is what `ask` without words asks; it comes ahead of the frames of a model with `question: before_frames`,
    whose gaze it steers. `reserve` tokens of the context are left for questions and answers (default RESERVE). Raises
    UserError for a multi_token model, and for a model that needs the question first and gets none.
    """

    def __init__(
        self,
        model: "FoveatedVLM",
        processor: Any = None,
        frames: Iterable[Any] | None = None,
        question: str | None = None,
        full: str = "stop",
        reserve: int | None = None,
    ):
        config = model.config
        self.context = config.context
        if config.visual == "multi_token":
            raise UserError("a multi_token model takes all frames at once: it has no stream")
        if full not in ("stop", "slide"):
            raise UserError(f"full is stop or slide, not '{full}'{did_you_mean(full, ('stop', 'slide'))}")
        if isinstance(frames, (str, Path)):
            raise UserError(f"a stream takes frames, not a path: processor.video('{frames}')[0] are some of its frames")
        self.model, self.processor, self.question = model, processor, question
        self.frames: Iterable[Any] = () if frames is None else frames
        self.full, self.reserve = full, min(RESERVE, self.context // 2) if reserve is None else reserve
        self.seen = 0  # frames
        self._last: tuple[Tensor, Cache] | None = None  # query and frame of the newest look, for its attention weights
        self._stream = Stream(model)
        self._head_keys: list[Tensor] = []  # of each layer: the keys of the words ahead of the frames, as read
        self.head = 0  # words ahead of the frames
        if config.question == "before_frames":
            if question is None:
                raise UserError("this model needs the question ahead of the frames: stream(question=...)")
            text = conversation([("user", question)], self._tokenizer, 0, True)
            self.head = text.prompt
            self._rest = text.tokens[text.prompt :]
            with torch.no_grad():
                self._stream.words(text.tokens[None, : text.prompt].to(model.device))
            self._head_keys = [layer.keys.to(torch.float32, copy=True) for layer in self._stream.memory.layers]
        if self.window < 1:
            raise UserError(
                f"a context of {self.context} tokens with {self.head} ahead of the frames and {self.reserve} reserved "
                "for questions has no room for a frame"
            )
        if full == "slide" and (kind := model.llm.base_model.rotary_emb.rope_type) != "default":
            raise UserError(f"full='slide' needs plain rotary positions; those of this language model are '{kind}'")

    def __iter__(self) -> Iterator[int]:
        """See `frames` one after the other; yields how many have been seen."""
        for frame in self.frames:
            self.see(frame)
            yield self.seen

    @torch.no_grad()
    def see(self, frame: Any) -> Tensor:
        """Look at one frame, u8 [3, s, s] (or what the processor takes as an image) -> the state [E] at it.

        Raises UserError when the context is full and the stream does not slide. After any exception, an interrupt
        included, the stream is as it was before the frame.
        """
        fits = isinstance(frame, Tensor) and frame.dtype == torch.uint8
        if not fits or frame.shape != (3, *2 * (self.model.config.frame_size,)):
            frame = self._of_processor.image(frame)[0][0]
        slides, W = self.room < 1, self.window
        if slides and self.full == "stop":
            raise UserError(
                f"the context of {self.context} tokens is full: {self.seen} frames and {self.head} words, with "
                f"{self.reserve} reserved for questions; start another stream, or let it slide (full='slide')"
            )
        cache = self.model.encoder.encode_only(frame[None].to(self.model.device))
        before = self._stream.hidden
        try:
            with self._stream.memory.writing(self.head + self.seen % W if slides else None):
                if slides:
                    self._turn(self.seen - W + 1)
                look = self._stream.look(cache, self.head + self.seen)
        except BaseException:
            self._stream.hidden = before
            if slides:
                self._turn(self.seen - W)
            raise
        self._last = look.query, cache
        self.seen += 1
        return look.hidden[0]

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Attention weights f32 [layers, 1, H, N] of the newest look. Raises ValueError before the first frame."""
        if self._last is None:
            raise ValueError("no frame has been seen")
        return self.model.look_weights(*self._last)

    def _turn(self, places: int) -> None:
        """Rotate the keys of the words ahead of the frames to positions `places` later than they were read at."""
        if not self._head_keys:
            return
        llm = self.model.llm.base_model
        where = torch.full((1, 1), places, device=self._head_keys[0].device)
        cos, sin = llm.rotary_emb(self._head_keys[0], where)  # [1, 1, d], f32
        for block, layer, keys in zip(llm.layers, self._stream.memory.layers, self._head_keys, strict=True):
            if not getattr(block.self_attn, "use_rope", 1):  # SmolLM3: layers without positions
                continue
            one, other = keys.chunk(2, dim=-1)
            turned = keys * cos + torch.cat([-other, one], dim=-1) * sin
            layer.keys[:, :, : self.head] = turned.to(layer.keys.dtype)

    @torch.no_grad()
    def ask(
        self, question: str | None = None, generation_config: GenerationConfig | None = None, **options: Any
    ) -> str:
        """The answer to a question (by default that of the start) about the frames so far; the stream does not change.

        `options` are those of `generate`. Raises UserError when the context has no room for the question.
        """
        memory = self._stream.memory
        n, words = len(memory), self._words(question).to(self.model.device)
        room = self.context - n - len(words)
        if room < 1:
            raise UserError(
                f"the question is too long: its {len(words)} tokens and the {n} of the stream leave no room for an "
                f"answer in the context of {self.context}"
            )
        settings, left = self.model.settings(room, generation_config, options)
        beams = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        place = self.head + self.seen
        try:
            answer = self.model.llm.generate(
                input_ids=words[None],
                attention_mask=torch.ones(1, n + len(words), dtype=torch.int64, device=words.device),
                position_ids=torch.arange(place, place + len(words), device=words.device)[None],
                past_key_values=memory if beams == 1 else memory.copies(beams),
                generation_config=settings,
                **left,
            )
        finally:
            memory.forget(n)
        return str(self._of_processor.decode(answer[0, len(words) :]))

    def _words(self, question: str | None) -> Tensor:
        """The tokens of a question behind the frames, up to where its answer starts."""
        before = self.model.config.question == "before_frames"
        if question is None and self.question is None:
            raise UserError("give a question: this stream was started without one")
        if before and (question is None or question == self.question):
            return self._rest
        text = conversation([("user", question or self.question or "")], self._tokenizer, 0, before)
        if not before:
            return text.tokens
        # The turn of the first question is still open: the second is a new line of it.
        line = self._tokenizer(f"\n{question}", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return torch.cat([line, text.tokens[text.prompt :]])

    @property
    def window(self) -> int:
        """How many frames fit into the context."""
        return self.context - self.reserve - self.head

    @property
    def tokens(self) -> int:
        """Tokens in the cache: one for each remaining frame, and the words ahead of them."""
        return len(self._stream.memory)

    @property
    def room(self) -> int:
        """How many more frames fit before the context is full."""
        return self.head + self.window - self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the stream's cache."""
        return self._stream.memory.nbytes

    @property
    def _of_processor(self) -> Any:
        if self.processor is None:
            raise UserError("questions and pictures need the processor: model.stream(processor=...)")
        return self.processor

    @property
    def _tokenizer(self) -> Any:
        return self._of_processor.tokenizer
