"""Convert a ZeRO checkpoint to a folder that transformers loads.

    OUT/  config.json  model.safetensors  generation_config.json  tokenizer and processor files  code/  README.md

Weights are copied one at a time from the memory-mapped shards, so memory does not grow with the model. The written
model is reloaded and compared with the outputs recorded at save time (`verify.py`). OUT gets its name only when all of
this has succeeded.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fovlm.checkpoint.locate import open_run
from fovlm.checkpoint.model_card import card
from fovlm.checkpoint.run_folder import read_summary
from fovlm.checkpoint.safetensors_writer import WeightPlan, byte_size, write_tensors
from fovlm.checkpoint.verify import check
from fovlm.checkpoint.zero_reader import Weights
from fovlm.data.chat import template
from fovlm.errors import UserError, did_you_mean, few
from fovlm.fileio import refuse_occupied, staged_dir
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.encoders.dinov2 import released_name
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import FoveatedProcessor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OnProgress = Callable[[int, int, str], None]  # done, total (0: unknown) and the name of the step


def convert(
    source: str | Path,
    out: str | Path,
    dtype: str = "bf16",
    shard_size: str = "4GB",
    which: str | None = None,
    tokenizer: str | None = None,
    on_progress: OnProgress = lambda done, total, step: None,
) -> Path:
    """Convert a run (`which`: best, latest or a step, as in `find_checkpoint`) or one checkpoint; returns `out`.

    `tokenizer` is a folder or id, for a checkpoint that was copied away from its run. Raises UserError, and writes
    nothing, if `source` is no run or checkpoint, files are damaged or missing, `out` is not empty, or the written model
    does not reproduce the recorded outputs.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is bf16 or fp32, not '{dtype}'{did_you_mean(dtype, DTYPES)}")
    largest = byte_size(shard_size)
    out = Path(out)
    refuse_occupied(out)
    on_progress(0, 0, "checking the checkpoint")
    saved = open_run(source, which)
    with staged_dir(out) as staging:
        config, words = saved.model_config(), saved.tokenizer(tokenizer)
        config.lora, config.example = None, example_question(saved.run)
        write_weights(staging, config, saved.merged(), DTYPES[dtype], largest, on_progress)
        write_settings(staging, config, words, DTYPES[dtype])
        on_progress(0, 0, "verifying the written model")
        checked = check(staging, saved.path, DTYPES[dtype], saved.merged())
        maps = sorted((saved.run / "maps").glob("step-*.png"))
        gaze = Path(shutil.copy2(maps[-1], staging / "gaze.png")).name if maps else ""
        text = card(out.resolve().name, saved.experiment, saved.state, read_summary(saved.run), dtype, checked, gaze)
        (staging / "README.md").write_text(text, encoding="utf-8")
    print(checked, file=sys.stderr)
    return out


def example_question(run: Path) -> str:
    """The question of the first clip in the newest attention maps of a run, "" without any."""
    maps = sorted((run / "maps").glob("step-*.npz"))
    return str(np.load(maps[-1])["texts"][0]).partition(" → ")[0] if maps else ""


def write_weights(
    out: Path, config: FoveatedConfig, stored: Weights, dtype: torch.dtype, largest: int, on_progress: OnProgress
) -> None:
    """Stream the stored weights into `out` as `dtype` (buffers keep their type), tied ones once. Raises UserError if
    names and shapes are not exactly those of a model of this configuration."""
    with torch.device("meta"):
        model = FoveatedVLM(config)
    tied = {released_name(name) for name in model.all_tied_weights_keys}
    shapes = {released_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    parameters = {released_name(name) for name, _ in model.named_parameters()}
    sources = {released_name(name): name for name in (*stored.ties, *stored.shapes)}
    wrong = [name for name in shapes.keys() - tied if name not in sources]
    wrong += sources.keys() - shapes.keys()
    wrong += [name for name in shapes.keys() & sources.keys() if stored.shape(sources[name]) != shapes[name]]
    if wrong:
        raise UserError(f"{stored.origin}: its weights are not those of its model: {few(sorted(wrong), 1)}")
    plan: WeightPlan = {
        name: (shape, dtype if name in parameters else stored.dtype(sources[name]))
        for name, shape in shapes.items()
        if name not in tied
    }
    write_tensors(
        out, plan, lambda name: stored.read(sources[name]), largest,
        lambda done, total: on_progress(done, total, "writing the weights"),
    )  # fmt: skip


def write_settings(out: Path, config: FoveatedConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json, tokenizer and processor. Raises UserError."""
    parts: list[Any] = [config, config.llm_config, config.encoder_config]
    for part in parts:
        part._name_or_path = ""  # a folder of this machine
    config.architectures, config.dtype = [FoveatedVLM.__name__], dtype
    config.save_pretrained(out)
    ids = end_tokens(tokenizer)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids if len(ids) > 1 else ids[0],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ids[0],
    ).save_pretrained(out)
    FoveatedProcessor.from_parts(tokenizer, config).save_pretrained(out)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer. Raises UserError for a tokenizer without a chat template."""
    _, _, tail = template(tokenizer)
    ends = dict.fromkeys([*tokenizer(tail, add_special_tokens=False)["input_ids"][:1], tokenizer.eos_token_id])
    return [token for token in ends if token is not None]
