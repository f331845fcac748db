"""The documentation: its site builds without a warning or a network, its notebook runs, its figures are up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fovlm.config import experiments
from scripts import draw_architecture, write_settings

ROOT = Path(__file__).resolve().parent.parent
# Files that runs and commands write, which pages name without their folder, and files of benchmarks.
ELSEWHERE = {"manifest.json", "experiment.yaml", "deepspeed.json", "run_summary.json", "truth.json", "json/TASK.json",
             "vlmeval/config.py", "settings.json"}  # fmt: skip
PARTS = ("benchmarks", "docs", "ds_configs", "experiments", "fovlm", "kernels", "scripts", "tests")
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


def test_files_that_the_pages_name_exist():
    """By their path from the project's folder, or by the end of it."""
    files = {f"/{file.relative_to(ROOT)}" for part in PARTS for file in (ROOT / part).rglob("*") if file.is_file()}
    files |= {f"/{file.name}" for file in ROOT.iterdir()}
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        if page.name not in ("log.md", "comparison.md"):  # what was, and what others have
            named = re.findall(r"`((?:[\w-]+/)*[\w.-]+\.(?:py|yaml|sh|json|js))`", page.read_text(encoding="utf-8"))
            missing = [n for n in named if n not in ELSEWHERE and not any(f.endswith(f"/{n}") for f in files)]
            assert not missing, f"{page.name} names {missing}"


def test_the_api_pages_have_every_package():
    listed = set(re.findall(r"^::: ([\w.]+)", "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.M))
    packages = {f"fovlm.{folder.name}" for folder in (ROOT / "fovlm").iterdir() if (folder / "__init__.py").exists()}
    assert packages - {"fovlm.cli"} <= listed


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the pins of Jupyter need Python 3.11")
def test_the_tutorial_runs(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("FOVLM_PYTHON", sys.executable)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook writes
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    place = {"metadata": {"path": str(ROOT / "docs")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()  # raises what a cell raises


@pytest.mark.parametrize("theme", draw_architecture.THEMES)
def test_the_figure_of_the_architecture_is_what_its_script_draws(theme):
    drawn = (draw_architecture.FOLDER / f"architecture-{theme}.svg").read_text(encoding="utf-8")
    assert drawn == draw_architecture.draw(theme), "run python -m scripts.draw_architecture"


def test_the_page_of_settings_and_the_schema_of_editors_are_what_their_script_writes():
    for file, text in (
        (write_settings.PAGE, write_settings.page()),
        (write_settings.EDITOR, write_settings.editor_text()),
    ):
        assert file.read_text(encoding="utf-8") == text, "run python -m scripts.write_settings"


def test_the_schema_of_editors_accepts_our_experiments_and_no_misspelt_setting():
    jsonschema = pytest.importorskip("jsonschema", reason="comes with the docs' packages")
    checker = jsonschema.Draft7Validator(write_settings.editor_schema())
    files = sorted(experiments.EXPERIMENTS.glob("*.yaml"))
    for file in files:
        assert file.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n"), file.name
        assert not list(checker.iter_errors(experiments.read(file))), file.name
    for wrong in ({"optim": {"lr_lm": 1}}, {"runs": {"a": {"train": {"steps": 1}}}}, {"train": {"precision": "fp16"}}):
        assert list(checker.iter_errors(wrong)), wrong
