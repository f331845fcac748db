"""The index of a tar shard: what it says, when it is made again, and what it makes of broken tars."""

import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import pytest

from fovlm.data.index import MEDIA, make_index, open_index
from fovlm.data.shards import write_shards
from fovlm.errors import UserError
from helpers import tiny


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


JSON = json.dumps(tiny.conversation()).encode()


@pytest.fixture
def shard(tmp_path):
    samples = [
        {"__key__": "t", "json": tiny.conversation()},
        {"__key__": "i", "json": tiny.conversation(), "jpg": tiny.picture(1)},
        tiny.clip("c", 3),
        {"__key__": "v", "json": tiny.conversation(), "mp4": tiny.video(2.6)},
        {"__key__": "p", "json": {"user": "?", "chosen": "a", "rejected": "b"}, "png": tiny.picture(2)},
    ]
    return write_shards(tmp_path / "all-%d.tar", samples)[0]


def test_kinds_frames_and_byte_ranges(shard):
    index = make_index(shard)
    assert index.key == ["t", "i", "c", "v", "p"]
    assert [index.kind(row) for row in range(5)] == ["text", "image", "video", "video", "preference"]
    assert index.frames.tolist() == [0, 1, 3, 3, 1]
    assert MEDIA[index.media[4]] == "image"
    assert not index.broken
    data = shard.read_bytes()
    for row in range(5):
        some = data[index.offset[row] :][: index.length[row]]
        assert zlib.crc32(some) == index.crc32[row]
        with tarfile.open(fileobj=io.BytesIO(some)) as tar:
            assert {name.partition(".")[0] for name in tar.getnames()} == {index.key[row]}
        record = data[index.record_offset[row] :][: index.record_length[row]]
        assert json.loads(record[512:].rstrip(b"\0"))["user"]  # behind its header


def test_long_names_are_within_the_range(tmp_path):
    key = "folder/" + "k" * 300
    path = write_tar(tmp_path / "a.tar", {"x.json": JSON, f"{key}.json": JSON, f"{key}.jpg": b"?"}, tarfile.PAX_FORMAT)
    index = make_index(path)
    assert index.key == ["x", key]
    some = path.read_bytes()[index.offset[1] :][: index.length[1]]
    with tarfile.open(fileobj=io.BytesIO(some)) as tar:
        assert tar.getnames() == [f"{key}.json", f"{key}.jpg"]


def test_the_file_is_reused_and_remade_when_the_shard_changes(shard, tmp_path):
    first = open_index(shard, tmp_path)
    file = shard.with_name(shard.name + ".index")
    written = file.stat().st_mtime_ns
    again = open_index(shard, tmp_path)
    assert file.stat().st_mtime_ns == written
    assert (again.key, again.checksum, again.crc32.tolist()) == (first.key, first.checksum, first.crc32.tolist())
    write_tar(shard, {"new.json": JSON})
    assert open_index(shard, tmp_path).key == ["new"]
    os.utime(shard, ns=(1, 1))
    assert open_index(shard, tmp_path).mtime_ns == 1
    file.write_text('{"version": 1, "key":')
    assert open_index(shard, tmp_path).key == ["new"]
    assert not list(shard.parent.glob(".*.unfinished"))


def test_where_the_folder_is_read_only_the_cache_holds_the_index(shard, tmp_path, monkeypatch):
    cache, beside = tmp_path / "cache", shard.with_name(shard.name + ".index")
    beside.mkdir()  # a folder of that name cannot be written to, not even by root
    (beside / "x").touch()
    open_index(shard, cache)
    assert len(list((cache / "index").iterdir())) == 1
    monkeypatch.setattr("fovlm.data.index.make_index", None)
    assert open_index(shard, cache).key[0] == "t"


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"a.jpg": b"?"}, "no JSON"),
        ({"a.json": b"{"}, "malformed JSON"),
        ({"a.json": b"[1]"}, "malformed JSON"),
        ({"a.json": b"[" * 100_000}, "malformed JSON"),
        ({"a.json": b"\xff\xfe\xff"}, "malformed JSON"),
        ({"a.json": JSON, "a.jpg": b"?", "a.png": b"?"}, "more than one picture or video"),
        ({"a.json": JSON, "a.000.jpg": b"?", "a.mp4": b"?"}, "more than one picture or video"),
        ({"a.json": JSON, "a.000.jpg": b"?", "a.0.jpg": b"?"}, "two pictures with the same number"),
        ({"a.json": JSON, "a.mp4": b"no video"}, "undecodable video"),
    ],
)
def test_a_broken_sample_has_its_cause_and_the_rest_stays(tmp_path, files, cause):
    index = make_index(write_tar(tmp_path / "a.tar", {"x.json": JSON, **files, "y.json": JSON}))
    assert index.key == ["x", "a", "y"]
    assert index.broken == {1: cause}


def test_files_that_are_no_media_are_left_alone(tmp_path):
    index = make_index(write_tar(tmp_path / "a.tar", {"a.json": JSON, "a.pyd": b"cos\nsystem\n", "a.pickle": b"..."}))
    assert (index.kind(0), index.broken) == ("text", {})


@pytest.mark.parametrize("cut", ["data", "header", "end"])
def test_a_truncated_tail_is_one_broken_sample(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar", {"x.json": JSON, "y.json": JSON, "y.jpg": tiny.picture(3, 64)})
    index = make_index(path)
    end = int(index.offset[1] + index.length[1])
    at = {"data": end - 600, "header": int(index.offset[1]) + 1024 + 100, "end": end}[cut]
    path.write_bytes(path.read_bytes()[:at])
    index = make_index(path)
    assert index.key == ["x", "y"]
    assert index.broken == {1: "truncated tar"}
    assert "damaged from byte" in index.warning
    assert open_index(path, tmp_path).warning == open_index(path, tmp_path).warning == index.warning


def test_a_damaged_header_in_the_middle_does_not_pass_for_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.json": JSON for i in range(9)})
    data = bytearray(path.read_bytes())
    data[4096:4608] = b"\x99" * 512  # a header: two blocks for each sample
    path.write_bytes(data)
    index = make_index(path)
    assert len(index) == 4
    assert index.broken == {3: "truncated tar"}


def test_members_apart_are_a_clear_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.json": JSON, "y.json": JSON, "x.jpg": b"?"})
    with pytest.raises(UserError, match=r"a\.tar.*'x' do not follow each other"):
        make_index(path)


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08" + b"compressed" * 100, b"text"])
def test_what_is_no_tar_is_a_clear_error(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar is not a plain tar"):
        make_index(tmp_path / "a.tar")
