"""The progress of long work: quick work says nothing, and where there is no terminal there are lines."""

import os
import subprocess
import sys

import pytest

from fovlm import progress


@pytest.mark.parametrize(("every", "said"), [(30.0, ""), (0.0, "[x]: 1 of 3\n[x]: 2 of 3\n[x]: 3 of 3\n")])
def test_lines_where_there_is_no_terminal(monkeypatch, capsys, every, said):
    monkeypatch.setattr(progress, "EVERY", every)
    assert list(progress.track([3, 4, 5], "[x]")) == [3, 4, 5]
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("delay", "shown"), [(60.0, False), (0.0, True)])
def test_a_bar_appears_on_a_terminal_when_it_takes_long(monkeypatch, capsys, delay, shown):
    monkeypatch.setattr(progress, "DELAY", delay)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(iter("ab"), "letters", 2)) == ["a", "b"]
    assert ("letters" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(("hide", "bars"), [("p.hide_foreign_bars(); ", False), ("", True)])
def test_bars_of_other_libraries_stay_out_of_a_log(hide, bars):
    code = f"import fovlm.progress as p; {hide}from tqdm.auto import tqdm; list(tqdm(range(3)))"
    env = {name: value for name, value in os.environ.items() if "DISABLE" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert ("100%" in done.stderr) == bars
