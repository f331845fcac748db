"""`python -m fovlm.checkpoint.convert RUN_OR_CHECKPOINT OUT`: a ZeRO checkpoint to a folder that transformers loads.

    OUT/  config.json  model.safetensors  generation_config.json  tokenizer and processor files  README.md

Weights go from the mapped shards to the file one by one (`zero.py`, `tensors.py`). What was written is then loaded
and held against the nll that the engine recorded at the save (`probe.py`). All this happens in a folder beside OUT that
gets its name at the very end: OUT is whole and checked, or not there.

`--to universal` makes a checkpoint that training can go on from on any number of ranks:
`./launch.sh NAME train.resume=OUT`.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from fovlm.checkpoint import store
from fovlm.checkpoint.locate import SavedRun, find, steps
from fovlm.checkpoint.model_card import card
from fovlm.checkpoint.run_folder import read_summary
from fovlm.checkpoint.safetensors_writer import Plan, byte_size, write_tensors
from fovlm.checkpoint.store import ENGINE, UNIVERSAL
from fovlm.checkpoint.verify import check
from fovlm.checkpoint.zero_reader import ZeroWeights
from fovlm.data.chat import load_tokenizer, template
from fovlm.data.dataset import tokenizer_path
from fovlm.errors import EXIT_USER_ERROR, UserError, did_you_mean, format_error
from fovlm.fileio import staged_dir
from fovlm.model.build import find_weights
from fovlm.model.encoder import Dinov2Config, released_name
from fovlm.model.modeling import FoveatedConfig, FoveatedVLM
from fovlm.model.processing import FoveatedProcessor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
say = Console(stderr=True, highlight=False, soft_wrap=True).print


def convert(
    source: str | Path,
    out: str | Path,
    dtype: str = "bf16",
    shard_size: str = "4GB",
    trust: bool = False,
    which: str | None = None,
    to: str = "model",
    tokenizer: str | None = None,
) -> Path:
    """Convert a run (its best checkpoint, else its latest; or `which`: best, latest or a step) or one checkpoint.

    `to` is "model", for transformers, or "universal", for training to go on from. `tokenizer` is a folder or an id, for
    old runs that do not hold theirs. Returns OUT. Raises UserError, and leaves nothing, for a folder that is neither a
    run nor a checkpoint, damaged or missing shards, an OUT that is not empty, files that weights_only cannot read
    (unless `trust`), and when the model as written does not answer as the one in training did.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is bf16 or fp32, not '{dtype}'{did_you_mean(dtype, DTYPES)}")
    if to not in ("model", "universal"):
        raise UserError(f"--to is model or universal, not '{to}'{did_you_mean(to, ('model', 'universal'))}")
    largest = byte_size(shard_size)
    out = Path(out)
    refuse_occupied(out)
    found = find(Path(source), which)
    with staged_dir(out) as staging:
        if to == "universal":
            _universal(found, staging)
        else:
            _model(found, staging, out.resolve().name, DTYPES[dtype], largest, trust, tokenizer)
    return out


def refuse_occupied(out: Path) -> None:
    """Raise UserError when `out` is there and not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not empty: remove it, or give another folder")


def _model(
    source: SavedRun, out: Path, name: str, dtype: torch.dtype, largest: int, trust: bool, tokenizer: str | None
) -> None:
    config, words = _config(source), _tokenizer(source, tokenizer)
    stored = ZeroWeights(source.path / ENGINE, trust)
    write_weights(out, config, stored, dtype, largest)
    write_texts(out, config, words, dtype)
    with steps() as bar:
        bar.add_task("loading and asking what was written", total=None)
        checked = check(out, source.path, dtype, ZeroWeights(source.path / ENGINE, trust))
    (out / "README.md").write_text(
        card(
            name,
            source.experiment,
            source.state,
            read_summary(source.run),
            str(dtype).removeprefix("torch."),
            checked,
        ),
        encoding="utf-8",
    )
    say(checked)


def _config(source: SavedRun) -> FoveatedConfig:
    """The configuration that the engine stored, or, in older checkpoints, that of the experiment's backbones."""
    file = source.path / store.CONFIG
    if file.is_file():
        return FoveatedConfig(**json.loads(file.read_text(encoding="utf-8")))
    model = source.experiment.model
    try:
        llm, dino = (
            of(**given)
            if isinstance(given, dict)
            else AutoConfig.from_pretrained(find_weights(given), trust_remote_code=False)
            for of, given in ((LlamaConfig, model.llm), (Dinov2Config, model.encoder))
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source.path}: an old checkpoint without its model's configuration, and {model.llm} or {model.encoder} is"
            f" not found: set FOVLM_MODELS ({' '.join(str(error).split())[:120]})"
        ) from error
    names = ("visual", "deep_query", "question", "query_rounds", "query_dim", "visual_scale", "frame_size")
    settings = {name: getattr(model, name) for name in names}
    return FoveatedConfig(llm, dino, image_frames=source.experiment.data.image_frames, **settings)


def _tokenizer(source: SavedRun, given: str | None) -> PreTrainedTokenizerBase:
    own = source.run / "tokenizer"
    if given is None and own.is_dir():
        return load_tokenizer(str(own))
    try:
        return load_tokenizer(given or tokenizer_path(source.experiment))
    except UserError as error:
        raise UserError(
            f"{source.run}: an old run without its tokenizer, which was not found elsewhere: set FOVLM_MODELS and "
            f"FOVLM_DATA as for the training, or --tokenizer FOLDER ({error})"
        ) from error


class Weights(Protocol):
    """Weights that are somewhere, by name: those of a ZeroWeights, or of another's model."""

    shapes: dict[str, tuple[int, ...]]
    ties: dict[str, str]
    origin: str

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> torch.Tensor: ...
    def close(self) -> None: ...


def write_weights(out: Path, config: FoveatedConfig, stored: Weights, dtype: torch.dtype, largest: int) -> None:
    """Stream the stored weights into `out`, in `dtype` (buffers keep theirs), tied ones once. Raises UserError.

    What is stored must be what a model of this configuration has, no more and no less.
    """
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
        raise UserError(
            f"{stored.origin}: its weights are not those of the model that it describes: {sorted(wrong)[0]}"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )
    plan: Plan = {
        name: (shape, dtype if name in parameters else stored.dtype(sources[name]))
        for name, shape in shapes.items()
        if name not in tied
    }
    with steps() as bar:
        task = bar.add_task("writing the weights", total=sum(_bytes(*entry) for entry in plan.values()))
        write_tensors(
            out, plan, lambda name: stored.read(sources[name]), largest, lambda written: bar.advance(task, written)
        )
    stored.close()


def write_texts(out: Path, config: FoveatedConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """config.json, generation_config.json, tokenizer and processor. Raises UserError."""
    parts: list[Any] = [config, config.llm_config, config.encoder_config]
    for part in parts:
        part._name_or_path = ""  # a folder of this machine
    config.architectures, config.dtype = [FoveatedVLM.__name__], dtype
    config.save_pretrained(out)
    _, _, tail = template(tokenizer)
    ends = dict.fromkeys([*tokenizer(tail, add_special_tokens=False)["input_ids"][:1], tokenizer.eos_token_id])
    ids = [token for token in ends if token is not None]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids if len(ids) > 1 else ids[0],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ids[0],
    ).save_pretrained(out)
    FoveatedProcessor.from_parts(tokenizer, config).save_pretrained(out)


def _universal(source: SavedRun, out: Path) -> None:
    from fovlm.train.engine import to_universal  # deepspeed takes seconds to import: only for this

    for file in source.path.iterdir():
        if file.is_file() and not file.name.startswith(("random-", "zero_to_", store.MANIFEST)):
            shutil.copy2(file, out / file.name)
    with steps() as bar:
        bar.add_task("making the universal checkpoint", total=None)
        to_universal(source.path, out / UNIVERSAL)
        files = sorted(p for p in out.rglob("*") if p.is_file())
        manifest = store.seal(files, out)
    (out / store.MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def main(arguments: list[str] | None = None) -> int:
    """Convert; returns the exit status: 0, or 2 for a mistake that one line explains."""
    parser = argparse.ArgumentParser(
        prog="python -m fovlm.checkpoint.convert", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder or name, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp32 (default bf16)")
    parser.add_argument("--shard-size", default="4GB", help="largest file, like 4GB or 500MB (default 4GB)")
    parser.add_argument("--step", dest="which", help="best, latest or a step (default: best, or latest if none is)")
    parser.add_argument("--to", default="model", help="model, or universal: to go on training on other ranks")
    parser.add_argument("--tokenizer", help="a folder or id, for old runs that do not hold theirs")
    parser.add_argument("--trust", action="store_true", help="unpickle files freely: runs whatever code they hold")
    try:
        print(convert(**vars(parser.parse_args(arguments))))
    except (UserError, OSError) as error:
        if not (said := format_error(error)):
            raise
        print(f"fovlm: {said}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
