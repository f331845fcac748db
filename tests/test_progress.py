"""The progress of long work: quick work says nothing, and where there is no terminal there are lines."""

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
