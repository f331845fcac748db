"""Files are complete or absent, also when writing fails, a process was killed, or two write at once."""

import errno
import os
from pathlib import Path

import pytest

from fovlm import fileio
from fovlm.errors import UserError


def interrupted(file: Path) -> None:
    with fileio.open_atomically(file) as out:
        out.write(b"half")
        assert len(os.listdir(file.parent)) == 2
        raise KeyboardInterrupt


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "new" / "a.txt"
    fileio.write_atomically(file, "ä")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == ("ä".encode(), 0o644)
    with pytest.raises(KeyboardInterrupt):
        interrupted(file)
    assert file.read_text() == "ä"
    assert os.listdir(file.parent) == ["a.txt"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    with fileio.staged_dir(out) as staging:
        (staging / "file").touch()
        assert not out.exists()
    assert os.listdir(out) == ["file"]
    with pytest.raises(OSError, match="not empty"), fileio.staged_dir(out):
        pass
    with pytest.raises(UserError, match="the disk is full"), fileio.staged_dir(tmp_path / "other"):
        raise OSError(errno.ENOSPC, "no space")
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".a.tar.x.unfinished", ".b.tar.y.unfinished"):
        (tmp_path / name).touch()
    (tmp_path / ".a.tar.z.unfinished").mkdir()
    fileio.remove_unfinished(tmp_path / "a.tar")
    assert os.listdir(tmp_path) == [".b.tar.y.unfinished"]


@pytest.mark.parametrize("name", ["lock", "."])
def test_a_lock_has_one_holder(tmp_path, name):
    path = tmp_path / name
    with fileio.locked(path), pytest.raises(BlockingIOError), fileio.locked(path, wait=False):
        pass
    with fileio.locked(path, wait=False):
        pass


def test_digests_name_content(tmp_path):
    Path(tmp_path / "a").write_text("abc")
    assert fileio.digest_file(tmp_path / "a") == fileio.digest("abc") == fileio.digest(b"abc")
    assert (len(fileio.digest("abc")), len(fileio.digest("abc", 2))) == (32, 4)
