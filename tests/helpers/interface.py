"""A tiny model as users meet it: with a processor, questions, frames and streams."""

import torch
from transformers import GenerationConfig

from fovlm import FoveatedProcessor, FoveatedVLM
from fovlm.model.autoregressive import Stream
from helpers.models import FRAME, VOCABULARY, tiny_model
from helpers.tiny import tokenizer

QUESTION = "what is this ?"


def frames(count: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, FRAME, FRAME), dtype=torch.uint8, generator=random)


def says(text: str, **shown) -> list[dict]:
    parts = [{"type": kind, kind: what} for kind, what in shown.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def model_of(**settings) -> FoveatedVLM:
    """A tiny model that knows when an answer ends and can be told apart from others by what it says."""
    model = tiny_model(**settings).eval()
    with torch.no_grad():
        model.llm.get_input_embeddings().weight.mul_(30)  # else every answer is one token again and again
    words = tokenizer()
    assert len(words) <= VOCABULARY
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    return model


def processor_of(model: FoveatedVLM) -> FoveatedProcessor:
    return FoveatedProcessor.from_parts(tokenizer(), model.config)


def watch(model: FoveatedVLM, **settings) -> Stream:
    """A stream of the model, with the question it must know from the start."""
    if model.config.question == "before_frames":
        settings.setdefault("question", QUESTION)
    return model.stream(processor=processor_of(model), **settings)
