"""Commands that use a trained model: ask, look, demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fovlm.cli.progress import progress
from fovlm.errors import UserError, needs, say
from fovlm.media.location import check_camera, check_path
from fovlm.model.folder import check_folder
from fovlm.model.modes import mode_of

ModelFolder = Annotated[
    str,
    typer.Option("--model", "-m", envvar="FOVLM_MODEL", metavar="FOLDER", help="A converted model (`fovlm convert`)."),
]
Video = Annotated[
    str, typer.Argument(metavar="VIDEO", help="A video, animation (webp, gif), picture, or folder of pictures.")
]
Tokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
Frames = Annotated[int, typer.Option(min=1, metavar="N", help="Most frames; longer videos are sampled evenly.")]
Fps = Annotated[float, typer.Option(min=0.001, metavar="R", help="Frames per second; training uses 1.")]
Dtype = Annotated[str, typer.Option(help="bf16 or fp32.  [default: as stored, fp32 where a CPU has no bf16]")]
Mode = Annotated[
    str, typer.Option(help="autoregressive (frame by frame, the default), coarse_fine (as trained) or coarse_only.")
]


def ask(
    video: Video,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.")],
    model: ModelFolder = "",
    tokens: Tokens = 128,
    frames: Frames = 64,
    fps: Fps = 1.0,
    mode: Mode = "",
    dtype: Dtype = "auto",
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token; else sample.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
) -> None:
    """Ask about a video; the answer is printed as it is generated.

    Example: `fovlm ask clip.mp4 "What happens?" --model converted/LR1`
    """
    net, processor = load(model, mode, video, frames, dtype)
    clip = read(video, net, frames, fps)
    options: dict[str, Any] = {"mode": mode or None}
    if temperature:
        import torch

        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": temperature}
    from fovlm.viz.answer import answer

    with progress(f"looking at {count(len(clip.frames), 'frame')}") as update:
        pieces = answer(net, processor, clip, question, tokens, on_progress=update, **options)
        first = next(pieces, "")
    print(first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        first += piece
    print()
    if not first.strip():
        say("the model's answer is empty")


def look(
    context: typer.Context,
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="The video; nothing with --live.")] = "",
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="[QUESTION] [OTHER]", help="One question, or two to compare.")
    ] = None,
    model: ModelFolder = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the page and the images.")] = Path("look"),
    live: Annotated[
        str, typer.Option(metavar="INDEX", help="A camera by number (0 is the first), or a video file to play as one.")
    ] = "",
    layer: Annotated[int | None, typer.Option(help="Layer of the video and sheet, from 0. Default: the mean.")] = None,
    head: Annotated[int | None, typer.Option(help="Head of the video and sheet, from 0. Default: the mean.")] = None,
    tokens: Tokens = 128,
    frames: Frames = 64,
    fps: Fps = 1.0,
    mode: Mode = "",
    dtype: Dtype = "auto",
) -> None:
    """Show where the model looks: an interactive page, a video, a contact sheet and the attention weights.

    Example: `fovlm look clip.mp4 "What does the man hold?" --model converted/LR1 --out look`

    Compare two questions: `fovlm look clip.mp4 "What does the man hold?" "What is behind him?"`

    A camera, in the terminal: `fovlm look --live 0 --model converted/LR1`
    """
    asked = questions or []
    if live:
        for option in ("out", "layer", "head", "frames", "mode"):
            if getattr(context.get_parameter_source(option), "name", "") == "COMMANDLINE":
                why = "a camera is shown in the terminal, without files"
                raise UserError(f"--{option} has no effect with --live: {why}")
        check_model(model)
        check_camera(live)
        from fovlm.viz.camera import watch

        with progress("loading the model"):
            net, processor = open_(model, frames, dtype)
        watch(net, processor, live, [q for q in (video, *asked) if q], fps, tokens)
        return
    if not video:
        raise UserError("no video: fovlm look VIDEO [QUESTION], or --live 0 for a camera")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    if len(asked) > 2:
        raise UserError(f"{len(asked)} questions: give one, or two to compare (each in quotes)")
    net, processor = load(model, mode, video, frames, dtype)
    from fovlm.viz.answer import ALIKE
    from fovlm.viz.contact_sheet import check_choice, save_weights, write_contact_sheet
    from fovlm.viz.gaze import gaze_of
    from fovlm.viz.html import write_page
    from fovlm.viz.video import write_video

    encoder = net.config.encoder_config
    layers = encoder.num_hidden_layers if net.config.deep_query else 1
    check_choice((layers, 0, encoder.num_attention_heads), layer, head)
    clip = read(video, net, frames, fps)
    out.mkdir(parents=True, exist_ok=True)  # before the work
    gazes = []
    for question in asked or [""]:
        step = f"looking at {count(len(clip.frames), 'frame')}" + (f": {question}" if question else "")
        with progress(step) as update:
            gazes.append(gaze_of(net, processor, clip, question, tokens, mode=mode or None, on_progress=update))
        if question:
            print(f"{question}\n  {gazes[-1].answer}")
    if len(gazes) == 2 and net.config.question == "after_frames":
        say(ALIKE)
    written = []
    for n, gaze in enumerate(gazes, start=1):
        name = "look" if len(gazes) == 1 else f"look-{n}"
        with progress("writing the video and the contact sheet"):
            write_video(gaze, out / f"{name}.mp4", layer=layer, head=head)
            write_contact_sheet(gaze, out / f"{name}.png", layer=layer, head=head)
            save_weights(gaze, out / f"{name}.npz")
        written += [f"{name}.mp4", f"{name}.png", f"{name}.npz"]
    with progress("writing the page"):
        page = write_page(gazes, out / "look.html")
    print(f"open {page} in a browser; beside it: {', '.join(written)}")


def demo(
    model: ModelFolder = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Default: the first free port from 7860.")] = 0,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines open the page.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Ask Gradio for a public address, over the network.")] = False,
    examples: Annotated[
        str, typer.Option(metavar="DIR", help="A folder of example clips, or of the numbered frames of one.")
    ] = "",
    tokens: Tokens = 128,
    frames: Frames = 64,
    mode: Mode = "",
    dtype: Dtype = "auto",
) -> None:
    """Open a demo in the browser: upload or choose a clip, ask, read the answer, and see where the model looks.

    Example: `fovlm demo --model converted/LR1 --examples clips`
    """
    check_model(model, mode)
    if examples:
        check_path(examples)
    with progress("loading the model"):
        with needs("the demo", "gradio>=6"):
            from fovlm.viz.demo import serve
        from fovlm.media.clip import list_clips

        clips = list_clips(examples) if examples else []
        net, processor = open_(model, frames, dtype)
    serve(net, processor, Path(model).resolve().name, clips, tokens, frames, mode or None, port, host, share)


def check_model(folder: str, mode: str = "") -> None:
    """Check the folder of a model, and a way to look, before torch is imported. Raises UserError."""
    if not folder:
        raise UserError("no model: give --model FOLDER or set FOVLM_MODEL (a folder that fovlm convert made)")
    mode_of(mode, check_folder(Path(folder)).get("visual", "foveated"))


def open_(folder: str, frames: int, dtype: str) -> tuple[Any, Any]:
    """The model and the processor of a folder, on the GPU if there is one."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from fovlm.model.processing import open_model

    disable_progress_bar()  # the command shows its own
    net, processor = open_model(folder, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    processor.max_frames = frames
    return net, processor


def load(model: str, mode: str, video: str, frames: int, dtype: str) -> tuple[Any, Any]:
    """The model and its processor, for a video that is there."""
    check_model(model, mode)
    check_path(video)
    with progress("loading the model"):
        return open_(model, frames, dtype)


def read(video: str, net: Any, frames: int, fps: float) -> Any:
    """The clip; prints what could not be read of it."""
    from fovlm.media.clip import read_clip

    with progress(f"reading {Path(video).name}") as update:
        clip = read_clip(video, net.config.frame_size, frames, fps, update)
    if clip.note:
        say(f"{clip.name}: {clip.note}")
    return clip


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
