"""One rank's failure is every rank's: nobody is left waiting."""

import pytest

from fovlm import distributed
from fovlm.distributed import SharedError, collective_call
from fovlm.errors import UserError


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    """What this rank tells a second one, which has no problem."""
    gathered: list[str] = []
    monkeypatch.setattr(distributed, "gather", lambda value: gathered.append(value) or [value, ""])
    return gathered


def failing(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt(), OSError(2, "no such file", "x")])
def test_others_hear_of_an_exception_that_no_user_causes(sent, error):
    with pytest.raises(type(error)):
        collective_call(failing(error))
    assert sent == ["rank 0 failed, see its traceback"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("wrong"), "wrong"),
        (OSError(28, "No space left"), "No space left"),
        (FileExistsError(17, "File exists", "runs/x"), "runs/x: File exists"),
    ],
)
def test_a_mistake_on_one_rank_is_the_error_of_all(sent, error, line):
    with pytest.raises(SharedError, match=line):
        collective_call(failing(error))
    assert sent == [line]


def test_the_failure_of_another_rank_ends_this_one(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "rank 1 failed, see its traceback"])
    with pytest.raises(SharedError, match="rank 1 failed"):
        collective_call(lambda: 3)


def test_a_host_with_another_value_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, (value[0], "b"), ("other", "c"), ("other", "c")])
    with pytest.raises(SharedError, match=r"^c: other shards$"):
        distributed.check_same("shards", "other shards")
    monkeypatch.setattr(distributed, "gather", lambda value: [value, (value[0], "b")])
    distributed.check_same("shards", "other shards")
