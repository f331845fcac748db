"""The command line: fast help, answers, and one line with status 2 for every user error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fovlm import __version__, open_model
from fovlm.cli import use
from fovlm.cli.main import main
from fovlm.model import processing
from fovlm.viz import camera
from helpers import ROOT, models, tiny


@pytest.fixture
def film(tmp_path) -> str:
    path = tmp_path / "film.mp4"
    path.write_bytes(tiny.video(3, size=32))
    return str(path)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv("FOVLM_MODEL", raising=False)


def test_help_needs_neither_torch_nor_a_second():
    code = (
        "import sys; from fovlm.cli.main import main; status = main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'gradio', 'deepspeed'} & set(sys.modules);"
        "print('heavy:', sorted(heavy)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.endswith("heavy: []\n")
    for name in ("ask", "look", "demo", "convert", "import"):
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", ["ask", "look", "demo", "convert", "import"])
def test_every_command_shows_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"Example: fovlm {name} " in " ".join(capsys.readouterr().out.split())


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fovlm {__version__}\n"
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "Usage: fovlm" in capsys.readouterr().out


def user_error(capsys, *words: str) -> str:
    """The line that a user error prints."""
    assert main(list(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fovlm: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_mistakes_are_reported_before_torch_is_imported(film, saved_model):
    """A model that is not given or not there, a video that is not there, a mode that the model does not have."""
    mistakes = [
        (["ask", film, "what"], "no model: give --model"),
        (["ask", film, "what", "-m", "nowhere"], "no such folder: nowhere"),
        (["ask", "nothing.mp4", "what", "-m", saved_model], "no such file: nothing.mp4"),
        (["ask", film, "what", "-m", saved_model, "--mode", "multi_token"], "mode is coarse_only, coarse_fine"),
        (["look", "--live", "97", "-m", saved_model], "no camera 97"),
        (["demo", "-m", saved_model, "--examples", "nowhere"], "no such file: nowhere"),
    ]
    code = f"""
import sys
from fovlm.cli.main import main
for words in {[words for words, _ in mistakes]!r}:
    assert main(words) == 2
assert not {{"torch", "transformers", "av"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, (_, expected) in zip(done.stderr.splitlines(), mistakes, strict=True):
        assert line.startswith(f"fovlm: {expected}")


@pytest.mark.parametrize("has", [True, False])
def test_a_processor_without_bf16_computes_in_fp32(has, saved_model, tmp_path, monkeypatch, caplog):
    model, words = open_model(saved_model, "bf16")
    model.save_pretrained(tmp_path / "bf16")
    words.save_pretrained(tmp_path / "bf16")
    monkeypatch.setattr(processing, "cpu_has_bf16", lambda: has)
    assert open_model(tmp_path / "bf16")[0].dtype == (torch.bfloat16 if has else torch.float32)
    assert [record.message[:17] for record in caplog.records] == ([] if has else ["computing in fp32"])
    assert open_model(tmp_path / "bf16", "bf16")[0].dtype == torch.bfloat16


def test_misspelt_words_get_the_closest_name(capsys, film, saved_model):
    assert "no command 'lok' (did you mean 'look'?)" in user_error(capsys, "lok")
    assert "no command 'run': renamed to 'sweep'" in user_error(capsys, "run", "LR1")
    assert "--tokens" in user_error(capsys, "ask", film, "what", "--token", "3")
    assert "see fovlm ask --help" in user_error(capsys, "ask", film)
    assert "see fovlm ask --help" in user_error(capsys, "ask", film, "what", "--tokens", "many")
    assert "did you mean 'coarse_fine'?" in user_error(
        capsys, "ask", film, "what", "-m", saved_model, "--mode", "coarsefine"
    )


def test_a_folder_that_is_no_model(capsys, film, saved_model, tmp_path):
    assert "no model: give --model" in user_error(capsys, "ask", film, "what")
    assert "did you mean 'tiny'?" in user_error(capsys, "ask", film, "what", "-m", saved_model[:-1] + "i")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert f"fovlm convert {tmp_path / 'run'} OUT" in user_error(
        capsys, "ask", film, "what", "-m", str(tmp_path / "run")
    )
    assert "is not a model" in user_error(capsys, "look", film, "-m", str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(saved_model, broken, ignore=shutil.ignore_patterns("model.safetensors"))
    assert "weights are missing" in user_error(capsys, "ask", film, "what", "-m", str(broken))
    (broken / "model.safetensors").write_bytes(Path(saved_model, "model.safetensors").read_bytes()[:-1000])
    assert "does not load" in user_error(capsys, "ask", film, "what", "-m", str(broken))


@pytest.mark.parametrize("name", ["ask", "look"])
def test_a_file_that_cannot_be_decoded(capsys, saved_model, film, tmp_path, name):
    question = ["what is this"]
    words = lambda path: user_error(capsys, name, str(path), *question, "-m", saved_model)  # noqa: E731
    assert "did you mean 'film.mp4'?" in words(film[:-5] + ".mp4")
    (tmp_path / "letter.mp4").write_text("Dear Sir or Madam")
    assert "is no video or picture" in words(tmp_path / "letter.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "is empty" in words(tmp_path / "empty.mp4")
    (tmp_path / "cut.mp4").write_bytes(Path(film).read_bytes()[:-700])  # its index is at the end
    assert "no pictures in it" in words(tmp_path / "cut.mp4")
    (tmp_path / "none").mkdir()
    assert "holds no pictures" in words(tmp_path / "none")


@pytest.mark.parametrize("name", ["ask", "look"])
def test_a_question_longer_than_the_context(capsys, saved_model, film, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `look` makes its folder
    assert "no room for an answer in the context of 2048" in user_error(
        capsys, name, film, "is it " * 1100, "-m", saved_model
    )


def test_an_answer_is_printed_and_nothing_else(capsys, saved_model, film, monkeypatch):
    monkeypatch.setenv("FOVLM_MODEL", saved_model)
    assert main(["ask", film, "what is this ?", "--tokens", "5"]) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert len(first.out.strip()) > 0
    assert main(["ask", film, "what is this ?", "--tokens", "5"]) == 0
    assert capsys.readouterr().out == first.out
    assert main(["ask", film, "what is this ?", "--tokens", "9"]) == 0
    assert capsys.readouterr().out.startswith(first.out.rstrip("\n"))


def test_the_answer_is_that_of_generate(capsys, saved_model, film):
    from fovlm.media.clip import read_clip
    from fovlm.model.processing import open_model

    model, processor = open_model(saved_model)
    content = [{"type": "video", "video": read_clip(film, models.FRAME).frames}, {"type": "text", "text": "what ?"}]
    inputs = processor(messages=[{"role": "user", "content": content}])
    expected = processor.batch_decode(model.generate(**inputs, max_new_tokens=6))[0]
    assert main(["ask", film, "what ?", "--tokens", "6", "-m", saved_model]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_damaged_video_is_answered_with_a_note(capsys, saved_model, tmp_path):
    tiny.noise(10, tmp_path / "whole.mp4", movflags="faststart")
    whole, cut = (tmp_path / "whole.mp4").read_bytes(), tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    assert main(["ask", str(cut), "what ?", "--tokens", "3", "-m", saved_model]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("fovlm: cut.mp4: the file is cut short: read ")
    assert printed.out.strip()


def test_an_interrupt_is_quiet(capsys, monkeypatch, film, saved_model):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(use, "open_", stop)
    assert main(["ask", film, "what", "-m", saved_model]) == 130
    assert capsys.readouterr().err == ""


def test_the_status_reaches_the_shell_and_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m fovlm lok; echo $?; {sys.executable} -m fovlm --help | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("2\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("questions", [[], ["what ?"], ["what ?", "is it red ?"]], ids=len)
def test_looks_are_written_as_page_film_sheet_and_weights(capsys, saved_model, film, tmp_path, questions):
    out = tmp_path / "look"
    assert main(["look", film, *questions, "--tokens", "3", "--layer", "1", "--out", str(out), "-m", saved_model]) == 0
    said, printed = capsys.readouterr()
    assert ("its looks do not depend on the question" in printed) == (
        len(questions) == 2
    )  # the question is behind the frames
    names = ["look-1", "look-2"] if len(questions) == 2 else ["look"]
    assert {path.name for path in out.iterdir()} == {
        "look.html",
        *(f"{name}.{kind}" for name in names for kind in ("mp4", "png", "npz")),
    }
    assert all(question in said for question in [*questions, str(out / "look.html")])
    new = str(tmp_path / "new")
    assert "this model has layers 0 to 2" in user_error(
        capsys, "look", film, "what ?", "--layer", "3", "--out", new, "-m", saved_model
    )
    assert not Path(new).exists()
    assert "Not a directory" in user_error(capsys, "look", film, "what ?", "--out", f"{film}/new", "-m", saved_model)
    assert "is a file" in user_error(capsys, "look", film, "--out", film, "-m", saved_model)


def test_the_command_runs_from_any_folder(tmp_path):
    python = tmp_path / "a project" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    subprocess.run(
        ["bash", "-c", f". {ROOT}/scripts/env.sh; _make_command"], cwd=tmp_path / "a project", check=True, timeout=60
    )
    (tmp_path / "fovlm").symlink_to(python.parent / "fovlm")
    done = subprocess.run(["./fovlm", "ask", "a b"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    where, *rest = done.stdout.strip().rsplit(" -m ", 1)
    assert Path(where.split(":")[0]).resolve() == (tmp_path / "a project").resolve()
    assert rest == ["fovlm ask a b"]


def test_a_camera_is_watched_frame_by_frame(capsys, saved_model, film, monkeypatch):
    assert main(["look", "--live", film, "what ?", "--tokens", "3", "-m", saved_model]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed if line.startswith("frame ")] == ["frame 1", "frame 2", "frame 3"]
    assert printed[1].startswith("what ?  ")
    assert printed[-1].startswith("3 frames seen, 3 tokens in the cache")
    monkeypatch.setattr(camera, "camera", lambda *_: iter(()))
    assert "nothing in it decodes" in user_error(capsys, "look", "--live", film, "-m", saved_model)

    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(camera, "camera", interrupted)
    monkeypatch.setattr(use, "check_camera", lambda source: None)
    assert main(["look", "--live", "0", "-m", saved_model]) == 0
    assert "0 frames seen" in capsys.readouterr().out
    monkeypatch.undo()
    assert "no camera 97" in user_error(capsys, "look", "--live", "97", "-m", saved_model)


@pytest.mark.parametrize("option", ["--out", "--layer", "--mode"])
def test_options_without_an_effect_on_a_camera_are_refused(capsys, film, saved_model, option):
    printed = user_error(capsys, "look", "--live", film, option, "1", "-m", saved_model)
    assert printed == f"fovlm: {option} has no effect with --live: a camera is shown in the terminal, without files\n"


def test_a_name_that_is_too_long_is_one_line(capsys, film):
    long = "x" * 300
    for words in (
        ("ask", film, "what ?", "-m", long),
        ("look", film, "--out", long),
        ("convert", long, "out"),
        ("import", long, "out"),
        ("import", film, long),
        ("eval", long),
    ):
        assert "File name too long" in user_error(capsys, *words)


def test_the_demo_asks_for_gradio(capsys, saved_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "fovlm.viz.demo", raising=False)
    assert "pip install 'gradio>=6'" in user_error(capsys, "demo", "-m", saved_model)


def test_an_empty_answer_is_said_to_be_empty(film, saved_model, capsys, monkeypatch):
    monkeypatch.setattr("fovlm.viz.answer.answer", lambda *_, **__: iter(["", " "]))
    assert main(["ask", film, "what", "-m", saved_model]) == 0
    assert "the model's answer is empty" in capsys.readouterr().err
