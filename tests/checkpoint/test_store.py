"""Checkpoints are complete or absent: after a kill, damage or a full disk, a good one stays loadable."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from fovlm.checkpoint import run_folder, store
from fovlm.checkpoint.store import Checkpoints, State, read_state, seal, verify
from fovlm.errors import UserError


class Killed(BaseException):
    """A kill: nothing catches it."""


def save(checkpoints: Checkpoints, step: int, best: bool = False, metric: float | None = None) -> Path:
    """What the engine does, with small files in place of its shards."""
    staging = checkpoints.staging(f"step-{step:08d}")
    (staging / "engine").mkdir()
    for name in ("engine/a.pt", "engine/b.pt", "experiment.yaml"):
        (staging / name).write_text(f"{name} at {step}" * 100)
    manifest = seal(sorted(p for p in staging.rglob("*") if p.is_file()), staging)
    path = checkpoints.publish(staging, manifest, State(step=step, metric=metric), best)
    checkpoints.prune(keep_last=2, keep_best=1)
    return path


@pytest.fixture
def saved(tmp_path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, best=True, metric=1.0)
    save(checkpoints, 2, metric=2.0)
    return checkpoints


def ticks(monkeypatch, at: int | None) -> list[str]:
    """Count the calls that touch the disk, and raise Killed at the `at`-th."""
    calls: list[str] = []

    def counted(name: str, call):
        def tick(*args, **kwargs):
            if len(calls) == at:
                raise Killed(name)
            calls.append(name)
            return call(*args, **kwargs)

        return tick

    for owner, name in (
        *((os, n) for n in ("fsync", "mkdir", "unlink", "rmdir", "scandir")),
        *((Path, n) for n in ("rename", "write_text", "open")),
    ):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return calls


def test_a_kill_at_any_moment_of_a_save_leaves_a_loadable_state(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        checkpoints = Checkpoints(tmp_path / "counted")
        save(checkpoints, 1)
        calls = ticks(patch, None)
        save(checkpoints, 2)
        moments = len(calls)
    assert moments > 20
    for moment in range(moments):
        checkpoints = Checkpoints(tmp_path / f"killed{moment}")
        save(checkpoints, 1)
        with pytest.MonkeyPatch.context() as patch:
            ticks(patch, moment)
            with pytest.raises(Killed):
                save(checkpoints, 2)
        good = checkpoints.first_whole(verify=verify)
        assert good is not None
        assert not verify(good)
        latest = checkpoints.pointed("latest")
        assert latest is not None
        assert not verify(checkpoints.folder / latest)
        assert read_state(good).step in (1, 2)
        save(checkpoints, 3)
        assert checkpoints.pointed("latest") == "step-00000003", "and the next save works"
        assert not list(checkpoints.folder.glob(".staging*")), "what was left behind is gone"


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "manifest"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(saved, damage, caplog):
    file = saved.folder / "step-00000002" / "engine" / "a.pt"
    if damage == "changed":
        file.write_text("A" + file.read_text()[1:])
    elif damage == "shorter":
        file.write_text(file.read_text()[:-1])
    elif damage == "gone":
        file.unlink()
    else:
        (saved.folder / "step-00000002" / store.MANIFEST).write_text("{")
    good = saved.first_whole(verify=verify)
    assert good == saved.folder / "step-00000001"
    assert "step-00000002" in caplog.text
    assert "a.pt" in caplog.text or "manifest" in caplog.text


FILES = {"a.pt": {"bytes": 1, "blake2b": "0"}}
MANIFESTS = {
    "empty": b"{}",
    "no mapping": b"[1, 2]",
    "no text": b"\xff\xfe",
    "deep": b"[" * 10**5,
    "a long number": b'{"files": ' + b"9" * 5000 + b"}",
    "files of another form": b'{"files": {"a.pt": 3}, "blake2b": ""}',
    "no checksum": json.dumps({"files": FILES}).encode(),
    "another checksum": json.dumps({"files": FILES, "blake2b": "0" * 128}).encode(),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_wrong_is_damage(saved, case):
    (saved.folder / "step-00000002" / store.MANIFEST).write_bytes(MANIFESTS[case])
    assert verify(saved.folder / "step-00000002").startswith("no readable manifest: ")
    assert saved.first_whole(verify=verify) == saved.folder / "step-00000001"


def test_no_flip_of_a_manifest_is_taken_for_whole_with_other_content(saved):
    file = saved.folder / "step-00000002" / store.MANIFEST
    whole, entries = file.read_bytes(), store.read_manifest(file.parent)
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        if not verify(file.parent):
            assert store.read_manifest(file.parent) == entries, "a space became another"


def test_a_file_that_no_manifest_names_is_damage(saved):
    folder = saved.folder / "step-00000002"
    (folder / ".DS_Store").write_text("a desktop's own")
    assert not verify(folder)
    (folder / "engine" / "c.pt").write_text("from elsewhere")
    assert verify(folder) == "engine/c.pt is not in the manifest"


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", b"x" * 5000, b"..", b"\x00", b"step-00000009"])
def test_a_damaged_pointer_points_nowhere(saved, text):
    (saved.folder / "best").write_bytes(text)
    assert saved.pointed("best") is None
    assert saved.first_whole("best", verify=verify) == saved.folder / "step-00000002"
    (saved.folder / "best").unlink()
    (saved.folder / "best").mkdir()
    assert saved.pointed("best") is None


def test_a_folder_beside_the_checkpoints_is_none(saved):
    shutil.copytree(saved.folder / "step-00000001", saved.folder / "step-old")
    assert saved.names() == ["step-00000001", "step-00000002"]
    save(saved, 3)


def test_ranks_share_the_verification(saved):
    path = saved.folder / "step-00000002"
    (path / "engine" / "a.pt").unlink()
    assert sorted(bool(verify(path, rank, 3)) for rank in range(3)) == [False, False, True]


def test_pruning_keeps_the_newest_and_the_best(saved):
    for step in range(3, 7):
        save(saved, step, metric=3.0)
    assert saved.names() == ["step-00000001", "step-00000005", "step-00000006"]
    assert saved.pointed("best") == "step-00000001"


def test_saving_a_step_again_replaces_it(saved):
    save(saved, 2, metric=0.5, best=True)
    assert saved.names() == ["step-00000001", "step-00000002"]
    assert read_state(saved.folder / "step-00000002").metric == 0.5


def test_a_full_disk_is_an_error_before_anything_is_written(saved, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 10**6))
    saved.need_room(9 * 10**5)
    with pytest.raises(UserError, match="make room"):
        saved.need_room(10**6)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"state\.json"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text('{"step": "many"}')
    with pytest.raises(UserError, match=r"state\.json"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "line", ['{"step": 1, "loss": 1' + 400 * "0" + "}", "[" * 10**4, '{"step": null}', "[1]", "\0"]
)
def test_a_line_of_metrics_that_makes_no_sense_is_dropped(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    assert run_folder.read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert run_folder.truncate_metrics(tmp_path, 5) == 1


def test_a_damaged_older_checkpoint_does_not_end_a_healthy_run(saved):
    (saved.folder / "step-00000001" / store.STATE).write_text("{}x")
    save(saved, 3, metric=3.0)
    assert saved.pointed("latest") == "step-00000003"
