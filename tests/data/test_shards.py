"""Shards as files: patterns, URLs, writing."""

import pytest

from fovlm.data.index import make_index
from fovlm.data.shards import find_shards, write_shards
from fovlm.errors import UserError
from helpers import tiny


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "data" / "news" / "a-%02d.tar", [tiny.clip(str(i), 0) for i in range(3)], per_shard=1)


def names(pattern: str) -> list[str]:
    return [path.name for path in find_shards("news", pattern)]


def test_patterns(tmp_path):
    every = ["a-00.tar", "a-01.tar", "a-02.tar"]
    for pattern in (
        "news/a-{00..02}.tar",
        "news/a-*.tar",
        "${FOVLM_DATA}/news/a-{00..02}.tar",
        f"{tmp_path}/data/*/*.tar",
    ):
        assert names(pattern) == every
    assert names("news/a-{02,00}.tar") == ["a-02.tar", "a-00.tar"]
    assert names("news/{a-00,a-*}.tar") == every  # a shard named twice is read once


@pytest.mark.parametrize("pattern", ["news/a-{00..03}.tar", "news/b-*.tar", "gone.tar"])
def test_a_missing_pattern_names_source_pattern_and_place(tmp_path, pattern):
    with pytest.raises(UserError) as error:
        find_shards("news", pattern)
    for part in ("data.sources.news.shards", pattern, str(tmp_path / "data"), "FOVLM_DATA"):
        assert part in str(error.value)


def test_braces_without_their_half():
    with pytest.raises(UserError, match="unbalanced brace"):
        find_shards("news", "news/a-{00..02.tar")


@pytest.mark.parametrize("pattern", ["pipe:echo hello", "pipe:rm -rf x |", "s3:a.tar", "file:///etc/passwd"])
def test_nothing_but_files_and_four_kinds_of_urls_is_opened(pattern):
    with pytest.raises(UserError, match="is neither a file nor a URL of https, http, s3, hf"):
        find_shards("news", pattern)


def test_writing(tmp_path):
    def samples(n=5):
        yield from (tiny.clip(f"k{i}", i % 3) for i in range(n))

    paths = write_shards(tmp_path / "w" / "s-%d.tar", samples(), per_shard=2)
    assert [path.name for path in paths] == ["s-0.tar", "s-1.tar", "s-2.tar"]
    assert [make_index(path).key for path in paths] == [["k0", "k1"], ["k2", "k3"], ["k4"]]
    again = write_shards(tmp_path / "x" / "s-%d.tar", samples(), per_shard=2)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_an_interrupted_write_leaves_no_half_shard(tmp_path):
    def samples():
        yield from (tiny.clip(f"k{i}", 1) for i in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "w" / "s-%d.tar", samples(), per_shard=2)
    assert [path.name for path in (tmp_path / "w").glob("*.tar")] == ["s-0.tar"]
