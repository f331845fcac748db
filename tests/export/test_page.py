"""The exported page in a real Chromium: it answers as `fovlm ask` does, about the example and about a video file, asks
nobody else, and keeps thousands of frames in one context. `make page` fetches what it needs first.
"""

import functools
import http.server
import json
import os
import shutil
import threading

import pytest

from fovlm.cli.main import main
from fovlm.export import npm
from fovlm.media import encode
from fovlm.media.clip import read_clip
from helpers import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("onnxscript", reason="exporting needs the extra [export]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120_000  # milliseconds: a machine may be busy
QUESTION = "what does the cyan square show?"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.skipif(
        not all(npm.cached(package).is_file() for package in npm.PACKAGES), reason="needs packages: make page"
    ),
]


class Server(http.server.SimpleHTTPRequestHandler):
    """Any static server; with the two headers that let WebAssembly use threads."""

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def run():
    """A trained quickstart model: that of FOVLM_QUICKSTART, or runs/quickstart."""
    folder = os.environ.get("FOVLM_QUICKSTART", str(ROOT / "runs" / "quickstart"))
    if not os.path.isdir(os.path.join(folder, "checkpoints")):
        pytest.skip(f"needs a trained model, and {folder} is none: ./launch.sh quickstart")
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "out"
    assert main(["export", run, "--to", "page", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The model for `fovlm ask`."""
    out = tmp_path_factory.mktemp("model") / "out"
    assert main(["convert", run, str(out), "--dtype", "fp32"]) == 0
    return out


@pytest.fixture
def page(exported):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(exported)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        page = chromium.new_page(viewport={"width": 1000, "height": 760})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((here, "data:", "blob:")) else wrong.append(r.url))
        page.goto(here)
        page.wait_for_selector("body[data-ready]")
        yield page
        chromium.close()
    server.shutdown()
    assert not wrong


def answer(page) -> str:
    page.wait_for_selector(".ans[data-done]")
    return page.locator(".ans").first.inner_text()


def test_the_answers_are_those_of_ask(page, exported, folder, tmp_path, capsys):
    settings = json.loads((exported / "settings.json").read_text())
    assert settings["check"]["same"]
    assert settings["check"]["largest_difference"] < 1e-4
    page.locator("#example").click()
    about_example = answer(page)
    assert about_example == settings["check"]["answer_pytorch"] != ""
    print(page.locator("#state").inner_text(), page.locator(".ans").first.get_attribute("title"))
    before = page.locator("#frame").evaluate("canvas => canvas.toDataURL()")
    page.locator("#strip button").first.click()
    assert page.locator("#frame").evaluate("canvas => canvas.toDataURL()") != before
    # A video file, decoded by the browser: another order of the frames, and another question.
    frames = [read_clip(exported / name, 56).frames[0] for name in reversed(settings["example"])]
    shown = [frame.repeat_interleave(4, 1).repeat_interleave(4, 2).permute(1, 2, 0).numpy() for frame in frames]
    video = tmp_path / "clip.mp4"
    video.write_bytes(encode.encode_video(shown, 1.0))
    page.locator("#question").fill(QUESTION)
    page.set_input_files("#file", video)
    playwright.expect(page.locator(".q").first).to_have_text(QUESTION, timeout=PATIENCE)
    found = answer(page)
    assert page.locator("#strip button").count() == len(frames)
    capsys.readouterr()
    assert main(["ask", str(video), QUESTION, "--model", str(folder), "--dtype", "fp32"]) == 0
    assert found == capsys.readouterr().out.strip() != about_example


def test_a_question_leaves_no_trace_and_the_camera_is_watched(page):
    page.locator("#example").click()
    first = answer(page)
    tokens = page.locator("#of-context").inner_text()
    page.locator("#question").fill(QUESTION)
    page.locator("#ask").click()
    playwright.expect(page.locator(".ans[data-done]")).to_have_count(2, timeout=PATIENCE)
    page.locator("#question").fill(page.locator(".q").last.inner_text())
    page.locator("#ask").click()
    playwright.expect(page.locator(".ans[data-done]")).to_have_count(3, timeout=PATIENCE)
    assert page.locator(".ans").first.inner_text() == first
    assert page.locator("#of-context").inner_text() == tokens
    page.locator("#camera").click()
    playwright.expect(page.locator("#strip button")).to_have_count(3, timeout=PATIENCE)
    page.locator("#stop").click()
    page.wait_for_selector("#stop:disabled")


def test_an_hour_in_one_context_and_a_limit_that_says_so(page, exported):
    """3,600 frames, the example again and again, after which the context is called full."""
    settings = json.loads((exported / "settings.json").read_text())
    long = settings | {"context": 3600 + settings["reserve"] + 100, "example": settings["example"] * 1000}
    page.route("**/settings.json", lambda route: route.fulfill(json=long))
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.locator("#example").click()
    playwright.expect(page.locator("#note")).to_contain_text("The context is full", timeout=10 * PATIENCE)
    print(page.locator("#note").inner_text(), page.locator("#state").inner_text())
    assert "3,6" in page.locator("#note").inner_text()
    assert page.locator("#strip button").count() == 240
    answer(page)
