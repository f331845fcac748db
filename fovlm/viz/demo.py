"""`fovlm demo`: choose a clip, ask, read the answer as it is generated, see where the model looked.

No other file imports Gradio. Nothing uses the network: no analytics, no fonts or scripts from elsewhere. The gaze is
the page of `fovlm look` in an iframe.
"""

import base64
import html
import mimetypes
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fovlm.errors import UserError, say
from fovlm.media import encode
from fovlm.media.clip import Clip, read_clip
from fovlm.viz.answer import ALIKE, answer, stream_answer
from fovlm.viz.gaze import Gaze, gaze_of
from fovlm.viz.html import write_page

HOSTS = ["127.0.0.1", "localhost"]  # a page elsewhere whose name leads here is another host to a browser
PLAYED = ("video/mp4", "video/webm")
LARGEST = "1gb"  # of an uploaded file
# Gives the iframe the height of its content.
FIT = "this.style.height = this.contentDocument.documentElement.scrollHeight + 8 + 'px'"
CSS = """
.fovlm-strip {display: flex; gap: 4px; overflow-x: auto; padding-bottom: 6px}
.fovlm-strip figure {margin: 0; flex: none; text-align: center; font-size: 11px; opacity: .85}
.fovlm-strip img {height: 84px; border-radius: 4px; display: block}
#player img, #player video {width: 100%; max-height: 240px; object-fit: contain; border-radius: 4px; display: block}
.fovlm-gaze {width: 100%; border: 1px solid var(--border-color-primary); border-radius: 8px; background: white}
#examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
footer {display: none !important}
"""


def app(
    model: Any, processor: Any, title: str, examples: list[Path], tokens: int, frames: int, mode: str | None
) -> gr.Blocks:
    """The page. A clip is read when it is chosen; the answer is streamed, then the gaze is shown."""
    size = model.config.frame_size
    shown = [(path, thumb) for path in examples if (thumb := _thumb(path, size)) is not None]
    examples = [path for path, _ in shown]

    def read(path: str | None, fps: float) -> Clip:
        if not path:
            raise gr.Error("Choose a clip first.", print_exception=False)
        try:
            return read_clip(path, size, frames, fps)
        except UserError as error:
            raise gr.Error(str(error).replace(path, Path(path).name), print_exception=False) from error

    def chosen(path: str | None, fps: float) -> tuple[str, str]:
        return (player(path), strip(read(path, fps))) if path else ("", "")

    def picked(event: gr.SelectData) -> tuple[str, None]:
        return str(examples[event.index]), None

    def asked(path: str | None, question: str | None, other: str | None, fps: float) -> Iterator[tuple[str, str]]:
        questions = [text.strip() for text in (question, other) if text and text.strip()]
        if not questions:
            raise gr.Error("Ask something.", print_exception=False)
        clip, text = read(path, fps), ""
        gazes: list[Gaze] = []

        def look(question: str, **options: Any) -> None:
            gazes.append(gaze_of(model, processor, clip, question, tokens, mode, **options))

        has_gaze = model.config.visual != "multi_token"
        yield "…", ""
        try:
            if has_gaze:
                pieces = stream_answer(processor, partial(look, questions[0]))
            else:
                pieces = answer(model, processor, clip, questions[0], tokens, mode=mode)
            for piece in pieces:
                text += piece
                yield text, ""
            if not has_gaze:
                yield text, "<small>this model reads all patches of every frame alike: it has no gaze to show</small>"
                return
            yield text, "<small>drawing where it looked …</small>"
            for other_question in questions[1:]:
                look(other_question)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        alike = len(gazes) == 2 and model.config.question == "after_frames"
        yield text, (f"<small>{ALIKE}</small>" if alike else "") + framed(gazes)

    with gr.Blocks(title=f"fovlm · {title}", analytics_enabled=False) as page:
        gr.Markdown(f"## Where does it look?\n**{title}** spends one token on each frame and decides where to look.")
        with gr.Row():
            with gr.Column(scale=2):
                clip_path = gr.State("")  # an upload has a file, an example may be a folder
                file = gr.File(label="A video, animation or picture", elem_id="clip", height=150)
                if examples:
                    gallery = gr.Gallery(
                        [thumb for _, thumb in shown],
                        label="or one of these",
                        show_label=False,
                        columns=4,
                        height=min(25 + 120 * -(-len(examples) // 4), 265),
                        allow_preview=False,
                        buttons=[],
                        elem_id="examples",
                    )
                    gallery.select(picked, None, [clip_path, file])
                playing = gr.HTML(elem_id="player")
            with gr.Column(scale=3):
                question = gr.Textbox(
                    label="Question", value=model.config.example or "What happens in this video?", elem_id="question"
                )
                with gr.Accordion("More", open=False):
                    other = gr.Textbox(label="Another question, to see both gazes side by side", elem_id="other")
                    fps = gr.Slider(0.5, 8, value=1, step=0.5, label="Frames per second (training uses 1)")
                go = gr.Button("Ask", variant="primary", elem_id="ask")
                answered = gr.Textbox(label="Answer", lines=3, interactive=False, elem_id="answer")
        seen = gr.HTML(elem_id="frames")
        gaze = gr.HTML(elem_id="gaze")
        file.upload(lambda path: path, file, clip_path)
        file.clear(lambda: "", None, clip_path)
        gr.on([clip_path.change, fps.release], chosen, [clip_path, fps], [playing, seen])
        gr.on([go.click, question.submit], asked, [clip_path, question, other, fps], [answered, gaze])
    return page


def serve(
    model: Any,
    processor: Any,
    title: str,
    examples: list[Path],
    tokens: int = 128,
    frames: int = 64,
    mode: str | None = None,
    port: int = 0,
    host: str = "127.0.0.1",
    share: bool = False,
    wait: bool = True,
) -> str:
    """Serve the page until Ctrl-C (or return at once, unless `wait`) -> its address.

    `port` 0 is the first free one from 7860. `host` 0.0.0.0 is for other machines too, under any name; `share` asks
    Gradio for a public address. Raises UserError if the port is taken.
    """
    page = app(model, processor, title, examples, tokens, frames, mode)
    names = HOSTS if host in HOSTS and not share else ["*"]
    theme = gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, public = page.queue().launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=True,
            quiet=True,
            share=share,
            ssr_mode=False,
            footer_links=[],
            max_file_size=LARGEST,
            allowed_paths=[str(path.absolute()) for path in examples],
            theme=theme,
            css=CSS,
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=names)]},
        )
    except OSError as error:
        raise UserError(f"port {port or '7860 and those after it'} is taken: give another --port") from error
    if wait:
        print(f"fovlm: open {public or address} in a browser; Ctrl-C ends", flush=True)
        page.block_thread()
    return address


def player(path: str) -> str:
    """A file as the browser plays it; "" for a folder of frames, and for what browsers do not play."""
    kind, address = mimetypes.guess_type(path)[0] or "", f"gradio_api/file={quote(str(Path(path).absolute()))}"
    if kind.startswith("image/"):
        return f'<img src="{address}">'
    return f'<video src="{address}" controls muted loop></video>' if kind in PLAYED else ""


def strip(clip: Clip) -> str:
    """The frames of a clip with their times, as the model gets them."""
    jpegs = (base64.b64encode(encode.encode_jpeg(f.permute(1, 2, 0).numpy())).decode() for f in clip.frames)
    figures = (
        f"<figure><img src='data:image/jpeg;base64,{jpeg}'>{second:g} s</figure>"
        for jpeg, second in zip(jpegs, clip.seconds)
    )
    count = f"{len(clip.frames)} frame{'' if len(clip.frames) == 1 else 's'}, as the model gets them"
    note = f" · <b>{html.escape(clip.note)}</b>" if clip.note else ""
    return f"<small>{count}{note}</small><div class='fovlm-strip'>{''.join(figures)}</div>"


def framed(gazes: list[Any]) -> str:
    """The page of `fovlm look` in an iframe, which isolates its styles and scripts."""
    with tempfile.TemporaryDirectory() as folder:
        text = write_page(gazes, Path(folder) / "look.html").read_text(encoding="utf-8")
    return f'<iframe class="fovlm-gaze" height="860" onload="{FIT}" srcdoc="{html.escape(text)}"></iframe>'


def _thumb(path: Path, size: int) -> Any:
    """The first frame u8 [size, size, 3]; None, with a warning, if nothing decodes: the clip is not offered."""
    try:
        return read_clip(path, size, 1).frames[0].permute(1, 2, 0).numpy()
    except UserError as error:
        say(f"skipped: {error}")
        return None
