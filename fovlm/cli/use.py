"""Using a trained model: ask, look, demo, convert, import, bench."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fovlm.errors import UserError

PANEL = "Using a model"

ModelFolder = Annotated[
    str,
    typer.Option("--model", "-m", envvar="FOVLM_MODEL", metavar="FOLDER", help="A converted model (`fovlm convert`)."),
]
Video = Annotated[
    str, typer.Argument(metavar="VIDEO", help="A video, animation (webp, gif), picture, or folder of pictures.")
]
Tokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
Frames = Annotated[int, typer.Option(min=1, metavar="N", help="Most frames; of a longer video, evenly spaced ones.")]
Fps = Annotated[float, typer.Option(min=0.001, metavar="R", help="Frames a second; training takes one.")]
How = Annotated[
    str,
    typer.Option(help="autoregressive (as deployed), coarse_fine (as trained), coarse_only; unless told, as deployed."),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    for command in (convert, ask, look, demo):
        app.command(rich_help_panel=PANEL)(command)
    app.command("import", rich_help_panel=PANEL)(import_)
    app.command(rich_help_panel=PANEL, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
        bench
    )


def ask(
    video: Video,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask, in quotes.")],
    model: ModelFolder = "",
    tokens: Tokens = 128,
    frames: Frames = 64,
    fps: Fps = 1.0,
    mode: How = "",
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest word each time; else draw words.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="For draws.")] = 0,
) -> None:
    """Ask about a video; the answer appears word by word.

    Example: `fovlm ask clip.mp4 "What happens?" --model converted/LR1`
    """
    with waiting("loading the model"):
        from fovlm.media.clip import read_clip
        from fovlm.viz.answer import answer

        net, processor = open_(model, frames)
    with waiting(f"reading {Path(video).name}") as told:
        clip = read_clip(video, net.config.frame_size, frames, fps, told)
    tell(clip)
    options: dict[str, Any] = {"mode": mode or None}
    if temperature:
        import torch

        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": temperature}
    with waiting(f"looking at {count(len(clip.frames), 'frame')}") as told:
        pieces = answer(net, processor, clip, question, tokens, told=told, **options)
        first = next(pieces, "")
    print(first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def look(
    context: typer.Context,
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="What to look at; with --live nothing.")] = "",
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="[QUESTION] [OTHER]", help="One, or two to compare their gazes.")
    ] = None,
    model: ModelFolder = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the page and pictures go.")] = Path("look"),
    live: Annotated[
        str, typer.Option(metavar="INDEX", help="A camera by its number (0 is the first), or a video to play as one.")
    ] = "",
    layer: Annotated[
        int | None, typer.Option(help="Layer in the film and the sheet, from 0; unless told, the mean.")
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Head in the film and the sheet, from 0; unless told, the mean.")
    ] = None,
    tokens: Tokens = 128,
    frames: Frames = 64,
    fps: Fps = 1.0,
    mode: How = "",
) -> None:
    """See where the model looks: a page to play with, a film, a sheet for papers, and the weights.

    Example: `fovlm look clip.mp4 "What does the man hold?" --model converted/LR1 --out look`

    Two gazes side by side: `fovlm look clip.mp4 "What does the man hold?" "What is behind him?"`

    A camera, in the terminal: `fovlm look --live 0 --model converted/LR1`
    """
    asked = questions or []
    if live:
        if odd := given(context, "out", "layer", "head", "frames", "mode"):
            raise UserError(f"--{odd} has no effect with --live: a camera is shown in the terminal, nothing is kept")
        from fovlm.viz.camera import watch

        with waiting("loading the model"):
            net, processor = open_(model, frames)
        watch(net, processor, live, [q for q in (video, *asked) if q], fps, tokens)
        return
    if not video:
        raise UserError("look at what? fovlm look VIDEO [QUESTION], or --live 0 for a camera")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    if len(asked) > 2:
        raise UserError(f"{len(asked)} questions: one, or two to compare (each in quotes)")
    with waiting("loading the model"):
        from fovlm.media.clip import read_clip
        from fovlm.viz.answer import ALIKE
        from fovlm.viz.contact_sheet import check_choice, save_weights, write_contact_sheet
        from fovlm.viz.gaze import gaze_of
        from fovlm.viz.html import write_page
        from fovlm.viz.video import write_video

        net, processor = open_(model, frames)
    dino = net.config.encoder_config
    check_choice(dino.num_hidden_layers if net.config.deep_query else 1, dino.num_attention_heads, layer, head)
    with waiting(f"reading {Path(video).name}") as told:
        clip = read_clip(video, net.config.frame_size, frames, fps, told)
    tell(clip)
    try:  # ahead of the work
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror or error}") from error
    gazes = []
    for question in asked or [""]:
        with waiting(f"looking at {count(len(clip.frames), 'frame')}" + (f": {question}" if question else "")) as told:
            gazes.append(gaze_of(net, processor, clip, question, tokens, mode=mode or None, told=told))
        if question:
            print(f"{question}\n  {gazes[-1].answer}")
    if len(gazes) == 2 and net.config.question == "after_frames":
        print(f"fovlm: {ALIKE}", file=sys.stderr, flush=True)
    written = []
    for n, gaze in enumerate(gazes, start=1):
        name = "look" if len(gazes) == 1 else f"look-{n}"
        with waiting("writing the film and the sheet"):
            write_video(gaze, out / f"{name}.mp4", layer=layer, head=head)
            write_contact_sheet(gaze, out / f"{name}.png", layer=layer, head=head)
            save_weights(gaze, out / f"{name}.npz")
        written += [f"{name}.mp4", f"{name}.png", f"{name}.npz"]
    with waiting("writing the page"):
        page = write_page(gazes, out / "look.html")
    print(f"open {page} in a browser; beside it: {', '.join(written)}")


def demo(
    model: ModelFolder = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Unless told, the first free one from 7860 on.")] = 0,
    examples: Annotated[str, typer.Option(metavar="DIR", help="A folder of clips to choose from.")] = "",
    tokens: Tokens = 128,
    frames: Frames = 64,
    mode: How = "",
) -> None:
    """A page in the browser: upload or choose a clip, ask, read the answer as it comes, and see the gaze.

    Example: `fovlm demo --model converted/LR1 --examples clips`
    """
    with waiting("loading the model"):
        try:
            from fovlm.viz.demo import serve
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "gradio":
                raise
            raise UserError("the demo needs gradio: pip install 'fovlm[demo]'") from error
        from fovlm.media.clip import list_clips

        chosen = list_clips(examples) if examples else []
        net, processor = open_(model, frames)
    serve(net, processor, Path(model).resolve().name, chosen, tokens, frames, mode or None, port)


def convert(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or name, or a checkpoint.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    shard_size: Annotated[str, typer.Option(help="Largest file, like 4GB or 500MB.")] = "4GB",
    step: Annotated[str, typer.Option(help="best, latest or a step; unless told, best, or latest if none is.")] = "",
    to: Annotated[str, typer.Option(help="model, or universal: to go on training on other ranks.")] = "model",
    tokenizer: Annotated[str, typer.Option(help="A folder or id, for old runs that do not hold theirs.")] = "",
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle files freely: runs whatever code they hold.")
    ] = False,
) -> None:
    """Make a folder that `transformers` loads from what a run saved, and check that it answers alike.

    Example: `fovlm convert runs/LR1 converted/LR1`
    """
    if to == "universal" and (odd := given(context, "dtype", "shard_size", "tokenizer", "trust")):
        raise UserError(f"--{odd} has no effect with --to universal: a checkpoint keeps what training needs, as it is")
    with waiting("starting"):
        from fovlm.checkpoint.convert import convert as work
    print(work(source, out, dtype, shard_size, trust, step or None, to, tokenizer or None))


def import_(
    source: Annotated[str, typer.Argument(metavar="PATH", help="A file of weights, or a folder with one.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    llm: Annotated[
        str, typer.Option(help="Folder or id of the language model; unless told, SmolLM2 by its shapes.")
    ] = "",
    encoder: Annotated[str, typer.Option(help="Folder or id of the encoder; unless told, by its shapes.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Folder or id; unless told, that of the language model.")] = "",
    question: Annotated[
        str, typer.Option(help="The position of the question in its training: after_frames or before_frames.")
    ] = "after_frames",
    frame_size: Annotated[int, typer.Option(min=14, help="Pixels of a frame's side in its training.")] = 224,
    visual_scale: Annotated[float, typer.Option(help="Factor of its visual tokens.")] = 0.14,
    shard_size: Annotated[str, typer.Option(help="Largest file, like 4GB or 500MB.")] = "4GB",
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle files freely: runs whatever code they hold.")
    ] = False,
) -> None:
    """Take over a published foveated model of another make.

    Example: `fovlm import foveated.pt converted/foveated`
    """
    with waiting("reading the weights"):
        from fovlm.checkpoint.import_nanosmol import import_published
    names = (llm or None, encoder or None, tokenizer or None)
    print(import_published(source, out, *names, question, frame_size, visual_scale, dtype, shard_size, trust))


def bench(context: typer.Context) -> None:
    """Check the kernels against their reference on this machine, then time them.

    Example: `fovlm bench query --shapes small:64 --repeat 20`. All that follows goes to `python -m
    kernels.bench`; `python -m kernels.bench --help` lists it. How long a
    stream of frames takes: `python -m benchmarks.stream MODEL`, in the project's folder.
    """
    with waiting("starting"):
        from kernels.bench import main
    main(context.args)


def open_(folder: str, frames: int) -> tuple[Any, Any]:
    """The model and the processor of a folder, on the GPU if there is one."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from fovlm.model.processing import open_model

    if not folder:
        raise UserError("which model? --model FOLDER, or set FOVLM_MODEL (a folder made by fovlm convert)")
    disable_progress_bar()  # ours is on already
    net, processor = open_model(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    processor.max_frames = frames
    return net, processor


def given(context: typer.Context, *names: str) -> str:
    """The first of these options that was given on the command line, as it is written there; "" when none was."""
    said = (name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE")
    return next(said, "").replace("_", "-")


@contextmanager
def waiting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A spinner with the time on the terminal's error stream, gone when done; nothing where there is no terminal.

    It becomes a bar once it is told how much is done, of how much.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = BarColumn()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(what), total=None)

        def told(done: int, of: int) -> None:
            if bar not in progress.columns:
                progress.columns = (*progress.columns, bar)
            progress.update(task, completed=done, total=of)

        yield told


def tell(clip: Any) -> None:
    """What could not be read of a clip."""
    if clip.note:
        print(f"fovlm: {clip.name}: {clip.note}", file=sys.stderr, flush=True)


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
