"""Tars made to hang or crash a reader: what comes before the damage is used, and the run continues."""

import io
import json
import tarfile
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import pytest

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.index import make_index
from fovlm.data.sample_format import list_members, split_name
from fovlm.errors import UserError
from helpers import tiny

JSON = json.dumps(tiny.conversation()).encode()


def header(name: str, size: int = 0, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, **fields) -> bytes:
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)


def pax(records: dict[str, str], **fields) -> bytes:
    lines = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(str(n)) + len(rest))
        lines += str(length).encode() + rest
    return member("pax", lines, type=b"x", **fields)


GOOD = member("a.json", JSON) + member("b.json", JSON)
HOSTILE = {
    "negative size": header("c.json", -1),
    "minus one block": header("c.json", -512),
    "2^40": header("c.json", 2**40),
    "2^63": header("c.json", 2**63),
    "2^87": header("c.json", 2**87),
    "long name of 2^40": header("././@LongLink", 2**40, type=b"L"),
    "long name of negative size": header("././@LongLink", -512, type=b"L"),
    "pax header of 2^63": header("pax", 2**63, type=b"x"),
    "negative size in pax": pax({"size": "-512"}) + header("c.json"),
    "2^63 in pax": pax({"size": str(2**63)}) + header("c.json"),
    "words in pax": pax({"size": "many"}) + header("c.json"),
    "pax headers without end": pax({"comment": "x" * 60_000}) * 6 + header("c.json"),
    "no pax records": member("pax", b"\xff" * 600, type=b"x") + member("c.json", JSON),
    "digits without end in pax": member("pax", b"1" * 6000 + b" a=b\n", type=b"x") + member("c.json", JSON),
    "old sparse file": header("c.json", 512, type=b"S") + bytes(512),
    "sparse file in pax": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + member("c.json", b"9" * 512),
    "unknown kind of negative size": header("c", -1024, type=b"Z"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_before_a_hostile_header_is_used(tmp_path, name):
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + HOSTILE[name] + member("d.json", JSON) + bytes(1024))
    index = make_index(path)
    assert index.key[:2] == ["a", "b"]
    assert index.warning
    assert set(index.broken.values()) == {"truncated tar"}
    path.write_bytes(HOSTILE[name])
    with suppress(UserError):  # at the start, where some are no tar at all
        assert set(make_index(path).broken.values()) <= {"truncated tar"}


def test_a_number_of_a_frame_that_is_too_long_is_no_frame(tmp_path):
    shard = tmp_path / "a.tar"
    shard.write_bytes(GOOD + pax({"path": f"b.{'1' * 5000}.jpg"}) + member("x", b"1") + bytes(1024))
    assert not make_index(shard).broken


def test_names_that_are_not_text_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    names = ["\udcff\udcfe", "\x1b[31mred", "two\nlines", "\u202eright to left", "plain"]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            for extension, data in (("json", JSON), ("jpg", tiny.picture(1) if name == "plain" else b"broken")):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    keys = ["\\xff\\xfe", "\\x1b[31mred", "two\\nlines", "\\u202eright to left", "plain"]
    assert make_index(tmp_path / "a.tar").key == keys
    chat = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 200)
    data = Dataset({"a": DataSource(shards="a.tar", kind="image")}, {"a": 1.0}, chat, frame_size=16)
    read = [data.read(position) for position in range(5)]
    assert sorted(issue.key for _, issue in read if issue) == sorted(keys[:4])
    for _, issue in read:
        assert issue is None or issue.key.isprintable()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_python_reads_them(tmp_path, format):
    path: Path = tmp_path / "a.tar"
    long = ["f" * 90 + "/" + "n" * 90] + (["k" * 400, "ü" * 150] if format != tarfile.USTAR_FORMAT else [])
    with tarfile.open(path, "w", format=format) as tar:
        for name in ["short", "in/a.folder/short", *long, "ünicode"]:
            file, folder = tarfile.TarInfo(f"{name}.json"), tarfile.TarInfo(f"{name}.folder")
            file.size, file.mtime, folder.type = len(JSON), 1e9 + 0.5, tarfile.DIRTYPE
            file.uid = 2**40 if format == tarfile.GNU_FORMAT else 7
            tar.addfile(file, io.BytesIO(JSON))
            tar.addfile(folder)
    with tarfile.open(path) as tar:
        expected = [(*split_name(i.name), i.offset, i.offset_data, i.size) for i in tar if i.isreg()]
    with path.open("rb") as tar:
        assert [astuple(member) for member in list_members(tar, path.stat().st_size)] == expected
