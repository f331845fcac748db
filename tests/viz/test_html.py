"""The page of a gaze in a real Chromium: no errors or requests, every control works, hostile text does not run."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from fovlm.errors import UserError
from fovlm.viz.gaze import Gaze, Token
from fovlm.viz.html import clock, write_page

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'> %SCRIPT% &lt;"


def gaze(question: str = "what is it?", seed: int = 0, K: int = 5, layers: int = 3, H: int = 2, side: int = 4) -> Gaze:
    random = np.random.default_rng(seed)
    weights = {}
    for name in ("coarse", "fine"):
        raw = np.exp(3 * random.normal(size=(layers, K, H, 1 + side**2))).astype(np.float32)
        weights[name] = raw / raw.sum(-1, keepdims=True)
    weights["coarse"] = np.full_like(weights["coarse"], 1 / (1 + side**2))
    frames = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (K, 3, 14 * side, 14 * side), dtype=np.uint8))
    tokens = [Token("question", question), *(Token("frame", "", k) for k in range(K)), Token("answer", question)]
    return Gaze(
        frames, [float(k) for k in range(K)], question, question, weights, tokens, "film", "m", "autoregressive"
    )


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of gazes; fails at the end for errors, console messages and requests."""
    wrong: list[str] = []
    pages = []

    def open_(*gazes: Gaze):
        page = browser.new_page(viewport={"width": 900, "height": 900})
        path = write_page(list(gazes), tmp_path / "page.html")
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith("data:") or r.url == path.as_uri() else wrong.append(r.url)
        )
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert not wrong


def pixels(page, pane: int = 0) -> str:
    return page.evaluate(f"document.querySelectorAll('.pane canvas')[{pane}].toDataURL()")


def test_every_control_changes_the_overlay(opened):
    page = opened(gaze())
    seen = [pixels(page)]
    moves = [
        lambda: page.select_option("#scale", "clip"),
        lambda: page.keyboard.press("ArrowRight"),
        lambda: page.locator("#at").fill("3"),
        lambda: page.select_option("#layer", "2"),
        lambda: page.select_option("#head", "1"),
        lambda: page.locator("#alpha").fill("20"),
        lambda: page.locator(".t.frame").nth(4).click(),
    ]
    for move in moves:
        move()
        seen.append(pixels(page))
    assert [n for n, (one, two) in enumerate(itertools.pairwise(seen)) if one == two] == []
    page.locator("body").press("Home")
    assert page.locator("#now").text_content() == "0:00 · 1 of 5"
    page.locator("#chart").click(position={"x": 850, "y": 50})
    assert page.locator("#at").input_value() == "4"
    page.locator("#play").click()
    playwright.expect(page.locator("#at")).to_have_value("1")


def test_two_questions_have_two_panes_and_one_for_coarse(opened):
    page = opened(gaze("one?"), gaze("other?", seed=1))
    assert page.locator(".pane[data-kind=fine]").count() == 2
    assert page.locator(".pane[data-kind=coarse]").count() == 1
    assert pixels(page, 0) != pixels(page, 1)
    assert "one?" in page.locator(".pane").nth(0).inner_text()
    assert "other?" in page.locator(".pane").nth(1).inner_text()


def test_hostile_text_is_shown_and_not_run(opened):
    page = opened(gaze(HOSTILE))
    assert page.locator(".q").text_content() == HOSTILE
    assert page.evaluate("window.hurt") is None


def test_a_coarse_model_has_one_pane_and_a_phone_needs_no_horizontal_scrolling(opened):
    blind = gaze("what " * 30)
    del blind.weights["fine"]
    page = opened(blind)
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.locator(".pane").count() == 1
    assert page.locator(".ans").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_two_questions_to_a_coarse_model_are_both_answered(opened):
    gazes = [gaze("one?"), gaze("other?", seed=1)]
    for each in gazes:
        del each.weights["fine"]
    page = opened(*gazes)
    assert page.locator(".pane").count() == 1
    assert page.locator(".ans").all_text_contents() == ["one?", "other?"]


def test_equal_frames_of_a_video_keep_their_times(opened):
    still = gaze()
    still.frames[2] = still.frames[1]
    page = opened(still)
    page.keyboard.press("End")
    assert page.locator("#now").text_content() == "0:04 · 5 of 5"
    picture = gaze()
    picture.frames[:], picture.seconds[:] = picture.frames[0].clone(), [0.0] * 5
    page = opened(picture)
    assert "5 looks at 1 picture " in page.locator("#about").text_content()
    assert page.locator("#now").text_content().startswith("look 1")


def test_the_page_of_a_long_video_stays_small(tmp_path):
    page = write_page(
        [gaze(K=64, layers=12, H=6, side=16), gaze(seed=1, K=64, layers=12, H=6, side=16)], tmp_path / "p"
    )
    assert page.stat().st_size < 15e6  # noise for frames, which no JPEG can squeeze


def test_only_gazes_at_one_clip_share_a_page(tmp_path):
    with pytest.raises(UserError, match="same clip"):
        write_page([gaze(), gaze(K=4)], tmp_path / "p.html")


def test_clock():
    assert [clock(second) for second in (0, 59.999, 75.5, 3600)] == ["0:00", "1:00", "1:15.5", "60:00"]
