"""`fovlm export`: write a model's graphs, check them against PyTorch, and put them into a page.

    OUT/  encoder.onnx  look.onnx  llm.onnx  settings.json  tokenizer.json  tokenizer_config.json

settings.json has what a program needs to run the graphs, and how far they are from PyTorch. A page has also index.html,
its scripts, the packages that they import, and the frames of an example.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fovlm.checkpoint.convert import end_tokens
from fovlm.checkpoint.locate import find_folder, open_run
from fovlm.checkpoint.reference import ReferenceOutputs
from fovlm.data.chat import template
from fovlm.data.packing import Sample
from fovlm.errors import UserError
from fovlm.export import npm
from fovlm.export.compare import compare
from fovlm.export.graphs import GRAPHS, PROTOBUF, write_graphs
from fovlm.export.runtime import shrink
from fovlm.fileio import refuse_occupied, staged_dir
from fovlm.media import encode
from fovlm.media.clip import read_clip
from fovlm.model.encoders.families import side_of
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.modes import NEW_TOKENS
from fovlm.model.processing import open_model
from fovlm.model.streaming import RESERVE
from fovlm.viz.gaze import QUESTION
from fovlm.viz.heatmap import ALPHA, DARKEN, STOPS

TOLERANCE = 1e-4  # nats between an fp32 graph and PyTorch
PAGE = ("index.html", "page.js", "model.js")


@dataclass
class Source:
    """The model to export."""

    model: FoveatedVLM  # fp32
    tokenizer: PreTrainedTokenizerBase
    name: str
    samples: list[Sample] = field(default_factory=list)  # of the validation data of a run


def export(
    source: str | Path,
    out: str | Path,
    to: str = "onnx",
    weights: str = "fp32",
    example: str | None = None,
    question: str | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, step: None,
) -> dict[str, Any]:
    """Export a run (its best checkpoint) or a model's folder to `out`; returns what settings.json says of the check.

    `to` and `weights` are of KINDS and WEIGHTS. `example` is a clip and `question` what is asked first: of a run by
    default a sample of its validation data. Raises UserError, and writes nothing, for what cannot be exported, and if
    fp32 graphs are not equal to PyTorch.
    """
    out = Path(out)
    refuse_occupied(out)
    on_progress(0, 0, "loading the model")
    given = _open(source)
    with staged_dir(out) as staging:
        if to == "page":
            on_progress(0, 0, "fetching the packages of the page")
            npm.unpack(staging)
            for name in PAGE:
                (staging / name).write_text(files("fovlm.export").joinpath(name).read_text("utf-8"), "utf-8")
        on_progress(0, 0, "writing the graphs")
        write_graphs(given.model, staging)
        for name in GRAPHS if weights != "fp32" else ():
            on_progress(0, 0, f"{weights} weights of {name}")
            shrink(staging / f"{name}.onnx", weights)
        on_progress(0, 0, "comparing with PyTorch")
        frames, question = _example(given, example, question)
        settings = _settings(given, weights, question)
        settings["check"] = compare(given.model, given.tokenizer, staging, given.samples, frames, settings)
        if weights == "fp32" and settings["check"]["largest_difference"] > TOLERANCE:
            raise UserError(f"{source}: the graphs are not equal to PyTorch: {settings['check']}")
        settings["graphs"] = {name: (staging / f"{name}.onnx").stat().st_size for name in GRAPHS}
        if to == "page":
            if any((staging / f"{name}.onnx.data").exists() for name in GRAPHS):
                raise UserError(f"a browser loads files up to {PROTOBUF // 2**30} GB: give --weights int8 or int4")
            for k, frame in enumerate(frames if example or given.samples else ()):
                settings["example"].append(f"example-{k:03d}.png")
                (staging / settings["example"][k]).write_bytes(encode.encode_png(frame.permute(1, 2, 0).numpy()))
        given.tokenizer.save_pretrained(staging / "tokenizer")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (staging / "tokenizer" / name).replace(staging / name)
        shutil.rmtree(staging / "tokenizer")
        (staging / "settings.json").write_text(json.dumps(settings, indent=1), "utf-8")
    return settings


def _open(source: str | Path) -> Source:
    folder = find_folder(Path(source))
    if (folder / "config.json").is_file():
        model, processor = open_model(folder, torch.float32)
        return Source(model, processor.tokenizer, folder.resolve().name)
    saved = open_run(folder)
    reference = ReferenceOutputs.load(saved.path)
    model = saved.model().float().eval()
    samples = [s for s in reference.samples if len(s.frames) == s.looks > 0] if reference else []
    return Source(model, saved.tokenizer(), saved.run.resolve().name, samples)


def _example(given: Source, example: str | None, question: str | None) -> tuple[Tensor, str]:
    """The frames u8 [f, 3, s, s] of the example, and the first question."""
    size = given.model.config.frame_size
    if example:
        return read_clip(example, size).frames, question or QUESTION
    if given.samples:
        return given.samples[0].frames, question or _question(given.samples[0].tokens.tolist(), given.tokenizer)
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=random), question or QUESTION


def _question(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The question of a conversation's token ids."""
    start = len(tokenizer(template(tokenizer)[0], add_special_tokens=False)["input_ids"])
    end = next((n for n in range(start, len(ids)) if ids[n] in end_tokens(tokenizer)), start)
    return tokenizer.decode(ids[start:end]).strip() or QUESTION


def _settings(given: Source, weights: str, question: str) -> dict[str, Any]:
    model, tokenizer = given.model, given.tokenizer
    config, (before, middle, _) = model.config, template(tokenizer)
    count = sum(p.numel() for p in model.parameters())
    return {
        "about": f"{given.name}: {count / 1e6:.3g} million parameters in {weights}, one token a frame",
        "weights": weights,
        "frame_size": config.frame_size,
        "side": side_of(config.encoder_config, config.frame_size),
        "E": config.llm_config.hidden_size,
        "context": config.context,
        "reserve": min(RESERVE, config.context // 2),
        "tokens": NEW_TOKENS,
        "coarse": config.visual == "coarse",
        "before": config.question == "before_frames",
        "text": [before, middle],
        "ends": end_tokens(tokenizer),
        "question": question,
        "example": [],
        "stops": STOPS,
        "darken": DARKEN,
        "alpha": ALPHA,
    }
