"""Commands that make folders with a model: convert, import, export."""

from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer

from fovlm.cli.progress import progress
from fovlm.errors import UserError, did_you_mean
from fovlm.export import KINDS, WEIGHTS
from fovlm.media.location import check_path

Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder to create.")]
Dtype = Annotated[str, typer.Option(help="bf16 or fp32.")]
ShardSize = Annotated[str, typer.Option(help="Largest weight file, for example 4GB or 500MB.")]


def convert(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or name, or a checkpoint.")
    ],
    out: Out,
    dtype: Dtype = "bf16",
    shard_size: ShardSize = "4GB",
    step: Annotated[str, typer.Option(help="best, latest or a step. Default: best, or latest if none is best.")] = "",
    tokenizer: Annotated[str, typer.Option(help="A folder or id. Default: the run's own.")] = "",
) -> None:
    """Convert a training checkpoint to a folder that `transformers` loads, and verify the result.

    Example: `fovlm convert runs/LR1 converted/LR1`
    """
    with progress("starting") as update:
        from transformers.utils.logging import disable_progress_bar

        from fovlm.checkpoint.convert import convert as work

        disable_progress_bar()  # the command shows its own
        folder = work(source, out, dtype, shard_size, step or None, tokenizer or None, update)
    print(folder)


def import_(
    source: Annotated[str, typer.Argument(metavar="PATH", help="A file of weights, or a folder with one.")],
    out: Out,
    dtype: Dtype = "bf16",
    llm: Annotated[
        str, typer.Option(help="Folder or id of the language model. Default: the SmolLM2 with these shapes.")
    ] = "",
    tokenizer: Annotated[str, typer.Option(help="Folder or id. Default: the language model's.")] = "",
    question: Annotated[
        str, typer.Option(help="Where the question was in training: after_frames or before_frames.")
    ] = "after_frames",
    frame_size: Annotated[int, typer.Option(min=14, help="Side of a frame in training, in pixels.")] = 224,
    shard_size: ShardSize = "4GB",
) -> None:
    """Convert a checkpoint of the nanoSmol fVLM release.

    Example: `fovlm import foveated.pt converted/foveated`
    """
    with progress("reading the weights") as update:
        from transformers.utils.logging import disable_progress_bar

        from fovlm.checkpoint.import_nanosmol import import_published

        disable_progress_bar()
        names = (llm or None, tokenizer or None)
        folder = import_published(source, out, *names, question, frame_size, dtype, shard_size, update)
    print(folder)


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run (folder or name), or a model's folder.")
    ],
    to: Annotated[str, typer.Option(help="onnx, or page: what a browser needs, for any static server.")] = "onnx",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: exported/NAME-TO.")] = None,
    weights: Annotated[str, typer.Option(help="fp32, int8 or int4.")] = "fp32",
    example: Annotated[str, typer.Option(metavar="VIDEO", help="The example of the page. Default: a run's own.")] = "",
    question: Annotated[str, typer.Option(help="The first question of the page. Default: a run's own.")] = "",
) -> None:
    """Export a model as ONNX graphs, and compare them with PyTorch; or as a page that runs them in a browser.

    Example: `fovlm export quickstart --to page`
    """
    for option, word, known in (("to", to, KINDS), ("weights", weights, WEIGHTS)):
        if word not in known:
            raise UserError(f"--{option} is {', '.join(known)}, not '{word}'{did_you_mean(word, known)}")
    if example:
        check_path(example)
    out = out or Path("exported") / f"{Path(source).resolve().name}-{to}"
    with progress("starting") as update:
        from fovlm.export.write import export as work

        settings = work(source, out, to, weights, example or None, question or None, update)
    found, size = settings["check"], sum(settings["graphs"].values()) / 1e6
    answers = [shorten(found[name], 60, placeholder=" ...") for name in ("answer", "answer_pytorch")]
    print(
        f"{out}: {size:.1f} MB; nll {found['nll']:.4g}, with PyTorch {found['nll_pytorch']:.4g}; answer '{answers[0]}'"
        + ("" if found["same"] else f", with PyTorch '{answers[1]}'")
    )
    if to == "page":
        print(f"to serve it: python -m http.server --directory {out}")
