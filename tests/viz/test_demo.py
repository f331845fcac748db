"""The demo in a real browser: upload a clip, ask, move the gaze; no errors, no requests to other hosts."""

import http.client
import shutil
import tempfile

import pytest

from helpers import tiny

pytest.importorskip("gradio", reason="the demo needs the extra [demo]")
sync_api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")

from fovlm.errors import UserError  # noqa: E402
from fovlm.model.processing import open_model  # noqa: E402
from fovlm.viz import demo  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PATIENCE = 60_000  # milliseconds: a machine may be busy


@pytest.fixture(scope="module")
def model(saved_model):
    net, processor = open_model(saved_model)
    net.config.example = "what is shown ?"
    return net, processor


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    for n, seconds in enumerate((2, 4)):
        (folder / f"clip{n}.mp4").write_bytes(tiny.video(seconds, size=32))
    (folder / "frames").mkdir()
    for n in range(3):
        (folder / "frames" / f"{n}.jpg").write_bytes(tiny.picture(80 * n))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def address(model, examples, tmp_path_factory):
    broken = examples[0].with_name("broken.mp4")
    broken.write_bytes(examples[0].read_bytes()[:300])
    with pytest.MonkeyPatch.context() as patch:  # examples lie where Gradio by itself serves nothing
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield demo.serve(*model, "tiny", [broken, *examples], tokens=6, port=0, wait=False)
    demo.gr.close_all()


@pytest.fixture
def page(address):
    if BROWSER is None:
        pytest.skip("no chromium on the PATH")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.wrong, page.asked = [], []
        page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        yield page
        browser.close()


def test_upload_a_clip_and_ask(page, address, tmp_path):
    (tmp_path / "film.mp4").write_bytes(tiny.video(3, size=32))
    page.set_input_files("#clip input[type=file]", tmp_path / "film.mp4")
    page.wait_for_selector(".fovlm-strip img")
    assert page.locator(".fovlm-strip img").count() == 3
    page.wait_for_function(
        "document.querySelector('#player video').readyState > 0 || document.querySelector('#player video').error"
    )
    assert page.input_value("#question textarea") == "what is shown ?"
    page.fill("#question textarea", "what is this ?")
    page.click("#ask")
    gaze = page.frame_locator("iframe.fovlm-gaze")
    scrubber = gaze.locator("input[type=range]").first
    scrubber.wait_for()
    answer = page.input_value("#answer textarea").strip()
    assert answer
    assert answer in gaze.locator("body").inner_text()
    # Another clip, of those on offer, takes its place.
    page.locator("#examples img").nth(1).click()
    page.wait_for_function("document.querySelectorAll('.fovlm-strip img').length == 4")
    page.locator("#examples img").nth(2).click()  # a folder of frames is one clip
    page.wait_for_function("document.querySelectorAll('.fovlm-strip img').length == 3")
    # A mistake is shown, and the page still works.
    (tmp_path / "letter.mp4").write_text("Dear Sir or Madam")
    page.set_input_files("#clip input[type=file]", tmp_path / "letter.mp4")
    page.get_by_text("letter.mp4 is no video or picture").first.wait_for()
    assert page.wrong == []
    afar = [url for url in page.asked if not url.startswith((address, "data:", "blob:", "about:"))]
    assert afar == []


def test_a_page_under_another_name_is_not_served(address):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    for host, status in (("127.0.0.1", 200), ("localhost", 200), ("evil.example", 400)):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/", headers={"Host": f"{host}:{port}"})
        assert connection.getresponse().status == status, host
        connection.close()


def test_other_machines_are_served_when_asked_to(model):
    address = demo.serve(*model, "tiny", [], host="0.0.0.0", wait=False)
    connection = http.client.HTTPConnection("127.0.0.1", int(address.rstrip("/").rsplit(":", 1)[1]))
    connection.request("GET", "/", headers={"Host": "laptop.example"})
    assert connection.getresponse().status == 200


def test_a_taken_port_is_an_error(model, address):
    taken = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"port {taken} is taken"):
        demo.serve(*model, "tiny", [], port=taken, wait=False)
