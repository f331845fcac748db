"""The documentation: its site builds without a warning and without a network, and its drawn figures are up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import draw_architecture

ROOT = Path(__file__).resolve().parent.parent
# What a browser loads by itself: scripts, pictures, frames and style sheets, but not links to follow.
FETCHED = re.compile(
    r'<(?:script|img|iframe)\b[^>]* src="?https?:[^" >]+|<link\b[^>]*rel="?stylesheet[^>]*https?:[^>]+'
)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="mkdocs-material needs Python 3.11")
def test_the_site_builds_strictly_and_offline(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "concepts.html", "report.html", "404.html"} <= set(pages)
    for name, page in pages.items():
        fetched = FETCHED.findall(page)
        assert not fetched, f"{name} loads {fetched} from the network"


@pytest.mark.parametrize("theme", draw_architecture.THEMES)
def test_the_figure_of_the_architecture_is_what_its_script_draws(theme):
    drawn = (draw_architecture.FOLDER / f"architecture-{theme}.svg").read_text(encoding="utf-8")
    assert drawn == draw_architecture.draw(theme), "run python -m scripts.draw_architecture"
