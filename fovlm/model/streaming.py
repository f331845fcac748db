"""`model.stream`: watch frames one at a time, and be asked at any time.

A frame is encoded, looked at with the query that the language model's state gives, and becomes one token of its cache;
nothing else is kept of it. A question is answered on top of the cache and then forgotten, so that what is seen later is
bit for bit what it would have been without.

When the context is full the stream says so, or slides (`full="slide"`): the newest frame takes the place of the oldest.
Positions go on counting, so the distances between frames stay what they are; the words ahead of the frames, if any, are
turned to stand right before the oldest frame that is left. A kept frame remembers what it saw when it was read, that of
dropped frames included (as in StreamingLLM, arXiv 2309.17453, which keeps the first tokens in the same way).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fovlm.data.chat import conversation
from fovlm.errors import UserError, did_you_mean
from fovlm.model.autoregressive import Model, Stream
from fovlm.model.encoder import Cache

RESERVE = 512  # tokens that frames leave to a question and its answer, or half of the context if that is less


class FrameStream:
    """One video as it comes. `for count in stream` sees `frames` one by one; `see` takes one from elsewhere.

    `question` stands ahead of the frames of a model with prompt order `before`, which it steers, and is what `ask`
    without words asks. `reserve` tokens of the context are kept for questions and answers (RESERVE unless told). Raises
    UserError for a model that has no look, or one that wants a question and gets none.
    """

    def __init__(
        self,
        model: Model,
        processor: Any = None,
        frames: Iterable[Any] | None = None,
        question: str | None = None,
        full: str = "stop",
        reserve: int | None = None,
    ):
        config = model.config
        self.context = int(config.llm_config.max_position_embeddings)
        if config.visual == "multi_token":
            raise UserError("a multi_token model takes its frames all at once: it has no stream")
        if full not in ("stop", "slide"):
            raise UserError(f"full is stop or slide, not '{full}'{did_you_mean(full, ('stop', 'slide'))}")
        if isinstance(frames, (str, Path)):
            raise UserError(f"a stream takes frames, not a path: processor.video('{frames}')[0] are some of its frames")
        self.model, self.processor, self.question = model, processor, question
        self.frames: Iterable[Any] = () if frames is None else frames
        self.full, self.reserve = full, min(RESERVE, self.context // 2) if reserve is None else reserve
        self.seen = 0  # frames
        self._last: tuple[Tensor, Cache] | None = None  # the newest look's query and frame, to show where it went
        self._stream = Stream(model)
        self._kept: list[Tensor] = []  # the keys of the words ahead of the frames, as read, of each layer
        self.head = 0  # words ahead of the frames
        if config.question == "before_frames":
            if question is None:
                raise UserError("this model wants to know the question ahead of the frames: stream(question=...)")
            text = conversation([("user", question)], self._tokenizer, 0, True)
            self.head = text.prompt
            self._rest = text.tokens[text.prompt :]
            with torch.no_grad():
                self._stream.words(text.tokens[None, : text.prompt].to(model.device))
            self._kept = [layer.keys.to(torch.float32, copy=True) for layer in self._stream.memory.layers]
        if self.window < 1:
            raise UserError(
                f"a context of {self.context} tokens with {self.head} ahead of the frames and {self.reserve} kept for "
                "questions has no room for a frame"
            )
        if full == "slide" and (kind := model.llm.base_model.rotary_emb.rope_type) != "default":
            raise UserError(f"full='slide' needs plain rotary positions, and this language model's are '{kind}'")

    # -- seeing ------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        """See `frames` one after the other; gives how many have been seen."""
        for frame in self.frames:
            self.see(frame)
            yield self.seen

    @torch.no_grad()
    def see(self, frame: Any) -> Tensor:
        """Look at one frame, u8 [3, s, s] (or what the processor takes as an image) -> the state [E] behind it.

        Raises UserError when the context is full, unless the stream slides. Whatever is raised, an interrupt too, the
        stream is then as it was before the frame.
        """
        fits = isinstance(frame, Tensor) and frame.dtype == torch.uint8
        if not fits or frame.shape != (3, *2 * (self.model.config.frame_size,)):
            frame = self._of_processor.image(frame)[0][0]
        slides, W = self.room < 1, self.window
        if slides and self.full == "stop":
            raise UserError(
                f"the context of {self.context} tokens is full: {self.seen} frames and {self.head} words, with "
                f"{self.reserve} kept for questions; start another stream, or let it slide (full='slide')"
            )
        cache = self.model.encoder.encode_only(frame[None].to(self.model.device))
        look, before = (self._stream.query(1), cache), self._stream.hidden
        try:
            with self._stream.memory.writing(self.head + self.seen % W if slides else None):
                if slides:
                    self._turn(self.seen - W + 1)
                hidden = self._stream.look(cache, self.head + self.seen)
        except BaseException:
            self._stream.hidden = before
            if slides:
                self._turn(self.seen - W)
            raise
        self._last = look
        self.seen += 1
        return hidden[0]

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Where the newest frame was looked at: attention weights f32 [layers, 1, H, N]. None seen yet: ValueError."""
        if self._last is None:
            raise ValueError("no frame has been seen")
        query, cache = self._last
        return self.model.encoder.look_weights(self.model.connector.query_in(query), cache).float()

    def _turn(self, places: int) -> None:
        """Have the words ahead of the frames stand `places` later than they were read."""
        if not self._kept:
            return
        where = torch.full((1, 1), places, device=self._kept[0].device)
        cos, sin = self.model.llm.base_model.rotary_emb(self._kept[0], where)  # [1, 1, d], f32
        for layer, keys in zip(self._stream.memory.layers, self._kept, strict=True):
            one, other = keys.chunk(2, dim=-1)
            turned = keys * cos + torch.cat([-other, one], dim=-1) * sin
            layer.keys[:, :, : self.head] = turned.to(layer.keys.dtype)

    # -- being asked -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ask(
        self, question: str | None = None, generation_config: GenerationConfig | None = None, **options: Any
    ) -> str:
        """The answer to a question (that of the start, unless told) about what was seen; the stream does not notice.

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
        """The tokens of a question and what leads to its answer, behind the frames."""
        before = self.model.config.question == "before_frames"
        if question is None and self.question is None:
            raise UserError("ask something: this stream was started without a question")
        if before and (question is None or question == self.question):
            return self._rest
        text = conversation([("user", question or self.question or "")], self._tokenizer, 0, before)
        if not before:
            return text.tokens
        # The turn of the first question is still open: the second is a new line of it.
        line = self._tokenizer(f"\n{question}", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return torch.cat([line, text.tokens[text.prompt :]])

    # -- how much ----------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """How many frames there is room for."""
        return self.context - self.reserve - self.head

    @property
    def tokens(self) -> int:
        """Tokens in the cache: one for each frame that is kept, and the words ahead of them."""
        return len(self._stream.memory)

    @property
    def room(self) -> int:
        """How many frames still fit before the context is full."""
        return self.head + self.window - self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes that the stream keeps."""
        return self._stream.memory.nbytes

    @property
    def _of_processor(self) -> Any:
        if self.processor is None:
            raise UserError("questions and pictures need the processor: model.stream(processor=...)")
        return self.processor

    @property
    def _tokenizer(self) -> Any:
        return self._of_processor.tokenizer
