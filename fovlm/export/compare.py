"""Exported graphs beside PyTorch: the same nll of every token, the same answers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fovlm.data.chat import conversation
from fovlm.data.packing import Sample, collate
from fovlm.export.graphs import STATIC
from fovlm.export.runtime import GraphStream
from fovlm.model.autoregressive import autoregressive
from fovlm.model.modeling import FoveatedVLM


@torch.no_grad()
def compare(
    model: FoveatedVLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    samples: list[Sample],
    frames: Tensor,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The mean nll of the samples' answers from the graphs in `folder` and from the model in fp32, the largest
    difference at any token, and both answers to the question of `settings` about the frames u8 [f, 3, s, s].

    Without samples, the one sample is the question with PyTorch's answer. Adds `row`, the numbers in a row of the
    memory, to the settings.
    """
    graphs, kind = GraphStream(folder), STATIC if settings["coarse"] else None
    settings["row"] = graphs.memory.shape[1]
    text = conversation([("user", settings["question"])], tokenizer, 0, settings["before"])
    prompt, ends = torch.tensor([text.prompt]), settings["ends"]
    options: dict[str, Any] = {"max_new_tokens": settings["tokens"], "eos_token_id": ends, "do_sample": False}
    said = model.generate(text.tokens[None], frames=frames[None], prompt=prompt, **options)[0]
    if not samples:
        weight = torch.cat([torch.zeros(len(text.tokens)), torch.ones(len(said))])
        samples = [Sample("", "", frames, len(frames), torch.cat([text.tokens, said]), weight, text.prompt)]
    packs = [collate([s], model.config.frame_size, size=s.size) for s in samples]
    nll = [
        torch.stack([nll_of(graphs, s, kind), autoregressive(model, b)]) for s, b in zip(samples, packs, strict=True)
    ]
    mean = torch.cat([x[:, s.weight > 0] for x, s in zip(nll, samples, strict=True)], dim=1).mean(1).tolist()
    see(graphs, text.tokens[: text.prompt], frames, kind)
    answer = graphs.answer(text.tokens[text.prompt :].numpy(), ends, settings["tokens"])
    return {
        "samples": len(samples),
        "nll": mean[0],
        "nll_pytorch": mean[1],
        "largest_difference": max((x[0] - x[1]).abs().max().item() for x in nll),
        "same": answer == [token for token in said.tolist() if token not in ends],
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
        "answer_pytorch": tokenizer.decode(said, skip_special_tokens=True),
    }


def nll_of(graphs: GraphStream, sample: Sample, kind: int | None = None) -> Tensor:
    """The nll f32 [s] of each token of a sample whose frames are looked at once, 0 where nothing comes before it."""
    prompt, rest = sample.tokens[: sample.prompt], sample.tokens[sample.prompt :]
    ahead, at_frame = see(graphs, prompt, sample.frames, kind)
    behind = graphs.words(rest.numpy(), range(len(rest)))
    logits = torch.from_numpy(np.concatenate([ahead[:-1], at_frame, behind[:-1]]))
    known = sample.tokens[len(sample.tokens) - len(logits) :]
    nll = nnf.cross_entropy(logits, known, reduction="none")
    return torch.cat([torch.zeros(len(sample.tokens) - len(nll)), nll])


def see(graphs: GraphStream, prompt: Tensor, frames: Tensor, kind: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A new context with the words of the prompt, then the frames -> the logits at each word, and at the last frame."""
    graphs.forget()
    at_frame = ahead = graphs.words(prompt.numpy(), range(len(prompt))) if len(prompt) else graphs.no_logits
    for frame in frames.numpy():
        _, at_frame = graphs.see(frame, kind, scored=[0])
    return ahead, at_frame
