"""Stream the answer to one question about one clip, for `fovlm ask` and the demo."""

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextIteratorStreamer

from fovlm.media.clip import Clip

# Of two questions to a model with `question: after_frames`.
ALIKE = "this model was trained with the question after the frames: its looks do not depend on the question"


class Stopped(StoppingCriteria):
    """Ends `generate` at its next token once the reader is gone."""

    def __init__(self) -> None:
        self.event = Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def inputs_for(model: Any, processor: Any, clip: Clip, question: str) -> Any:
    """The model's inputs for a question about a clip, on the model's device."""
    shown = {"type": "image", "image": clip.frames[0]} if clip.still else {"type": "video", "video": clip.frames}
    content = [shown, {"type": "text", "text": question}]
    return processor(messages=[{"role": "user", "content": content}]).to(model.device)


def answer(
    model: Any,
    processor: Any,
    clip: Clip,
    question: str,
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[str]:
    """The answer in pieces; `on_progress` and `options` go to `generate`. Raises UserError as `generate` does."""
    inputs = inputs_for(model, processor, clip, question)
    work = partial(model.generate, **inputs, max_new_tokens=max_new_tokens, **options)
    return stream_answer(processor, work, on_progress)


def stream_answer(
    processor: Any, work: Callable[..., Any], on_progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """The answer of `work(streamer=..., stopping_criteria=..., on_progress=...)` in pieces; raises what it raises.

    Closing the iterator ends the work at its next frame or token. `on_progress(done, total)` counts frames.
    """
    streamer, stopped = TextIteratorStreamer(processor.tokenizer, skip_special_tokens=True), Stopped()

    def report(done: int, total: int) -> None:
        if stopped.event.is_set():
            raise CancelledError
        if on_progress:
            on_progress(done, total)

    pool = ThreadPoolExecutor(1)
    future = pool.submit(work, streamer=streamer, stopping_criteria=[stopped], on_progress=report)
    future.add_done_callback(lambda _: streamer.end())  # also when it fails
    try:
        yield from streamer
        future.result()
    finally:
        stopped.event.set()
        pool.shutdown(wait=False)
