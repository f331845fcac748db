"""Remote shards: the order and the samples of local ones, faults of servers, the cache and what it removes."""

import errno
import json
import logging
import os
import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from fovlm.config import schema
from fovlm.config.schema import DataSource
from fovlm.data import remote_fs, shard_cache
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataloader import PackLoader
from fovlm.data.dataset import Dataset
from fovlm.data.fetch_ahead import FetchAhead, upcoming
from fovlm.data.packing import PackBudget
from fovlm.data.shard_cache import RemoteShard, ShardCache
from fovlm.data.shards import find_shards
from fovlm.errors import UserError
from fovlm.fileio import digest_file
from helpers import tiny
from helpers.servers import file_server

BIG = 10**9
BUDGET = PackBudget(cost=240, frame=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with 12 shards of video and 2 of text."""
    folder = tmp_path_factory.mktemp("made")
    tiny.clips(folder, "video", [1, 3, 2, 4] * 9, per_shard=3)
    tiny.clips(folder, "words", [0] * 6, per_shard=3)
    return folder


@pytest.fixture
def server(made, tmp_path, monkeypatch):
    """The shards at a server that forgets them after the test; nothing waits long."""
    for name in ("FOVLM_DATA", "FOVLM_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(remote_fs, "PAUSE", 0.001)
    monkeypatch.setattr(shard_cache, "CHUNK", 4000)
    monkeypatch.setattr(shard_cache, "POLL", 0.01)
    (tmp_path / "served").mkdir()
    for file in made.glob("*.tar"):
        (tmp_path / "served" / file.name).write_bytes(file.read_bytes())
    with file_server(tmp_path / "served") as server:
        yield server


def manifest(folder: Path) -> None:
    shards = [{"name": p.name, "bytes": p.stat().st_size, "checksum": digest_file(p)} for p in folder.glob("*.tar")]
    (folder / "manifest.json").write_text(json.dumps({"shards": shards}))


def opened(where: str, cache: Path, limit: int = BIG, **more) -> Dataset:
    sources = {"video": DataSource(shards=f"{where}/video-{{00..11}}.tar", kind="video"),
               "words": DataSource(shards=f"{where}/words-{{00..01}}.tar", kind="text")}  # fmt: skip
    chat = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 100)
    weights = {"video": 0.8, "words": 0.2}
    return Dataset(sources, weights, chat, frame_size=16, cache=ShardCache(cache, limit), **more)


def shard(server, cache: Path, name: str = "video-00.tar", limit: int = BIG) -> RemoteShard:
    (found,) = find_shards("video", f"{server.url}/{name}", ShardCache(cache, limit))
    assert isinstance(found, RemoteShard)
    return found


def content(found: RemoteShard) -> bytes:
    with found.open() as file:
        return file.read()


def largest(server) -> int:
    return max(file.stat().st_size for file in server.folder.glob("*.tar"))


def test_samples_and_order_are_those_of_local_shards(server, made, tmp_path, caplog):
    """With room for three shards of the eight that are shuffled together."""
    local, remote = opened(str(made), tmp_path), opened(server.url, tmp_path / "c", 3 * largest(server))
    assert remote.hash == local.hash
    found = []
    for data in (local, remote):
        steps = islice(PackLoader(data, BUDGET, 2), 8)
        found.append([(s.cursor, [(b.keys, b.tokens.tolist(), b.frames.sum()) for b in s.batches]) for s in steps])
    assert found[0] == found[1]
    assert (
        caplog.text.count("holds less than the 0.00018 GB of shards that are read at once") == 1
    )  # 8 x 20,480 + 2 x 10,240


def test_what_is_needed_next_comes_in_the_order_of_positions(server, tmp_path):
    data = opened(server.url, tmp_path / "c", first={"words": 4})
    for cursor in (0, 3, 20, 57, 300):
        first_use: dict[RemoteShard, int] = {}
        for position in range(cursor, cursor + 200):
            source, number = data._find(position)
            first_use.setdefault(source.table.shards[source.table.place(number)[0]], position)
        found = list(upcoming(data, cursor))
        assert set(found) == set(first_use)
        assert min(first_use, key=first_use.__getitem__) in found[:10]  # eight of video, two of words
        assert cursor or found[0].name.startswith("words")
    assert list(upcoming(data, 0, stop=4)) == [s for s in upcoming(data, 0) if s.name.startswith("words")]


def test_it_fetches_ahead_what_half_the_cache_holds_and_keeps_it(server, tmp_path):
    data = opened(server.url, tmp_path / "index")
    cache = ShardCache(tmp_path / "c", 6 * largest(server))
    for source in data.sources:
        source.table.shards = [replace(shard, cache=cache) for shard in source.table.shards]
    with FetchAhead(data, 0, None) as ahead:
        wanted = ahead.wanted()
        assert 3 <= len(wanted) < 8
        for _ in range(300):
            if len(ahead.held) == len(wanted):
                break
            threading.Event().wait(0.02)
        assert set(ahead.held) == set(wanted)
        others = [s for source in data.sources for s in source.remote if s not in wanted]
        for other in others:  # eight more, for three of which there is room
            content(other)
        assert all(s.path.exists() for s in wanted)
        assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= cache.limit
        assert [s for s in others if s.path.exists()] == others[-len([s for s in others if s.path.exists()]) :]


@pytest.mark.parametrize("fault", ["drop", "500", "503", "slow", "wrong"])
def test_a_fault_on_the_way_is_made_good(server, made, tmp_path, fault, caplog):
    manifest(server.folder)
    found = shard(server, tmp_path)
    server.faults["/video-00.tar"] = ["", fault]
    assert content(found) == (made / "video-00.tar").read_bytes()
    asked = server.gets("video-00.tar")
    assert asked[0] == "bytes=0-3999"
    again = {"slow": asked, "wrong": ["bytes=0-3999"]}.get(fault, ["bytes=4000-7999"])
    assert len(asked) == len(set(asked)) + (len(set(asked)) if fault == "wrong" else fault != "slow")
    assert all(part in asked for part in again)
    assert ("try 2 of 7" in caplog.text) == (fault not in ("slow", "wrong"))


def test_a_server_that_stays_broken_is_named(server, tmp_path):
    found = shard(server, tmp_path)
    server.faults["/video-00.tar"] = ["500"] * 99
    with pytest.raises(UserError) as error:
        content(found)
    for part in ("video-00.tar", server.url.removeprefix("http://"), "tried 7 times", "500"):
        assert part in str(error.value)
    assert len(server.gets("video-00.tar")) == 7
    with pytest.raises(UserError, match=r"video-00.tar on 127.0.0.1:\d+: .*500.*tried 7"):
        list(islice(PackLoader(one_source(server, tmp_path), BUDGET, 1), 1))


def one_source(server, tmp_path) -> Dataset:
    """A dataset of one shard, indexed while its server worked, and no longer in the cache."""
    faults, server.faults = server.faults, {}
    source = DataSource(shards=f"{server.url}/video-00.tar", kind="video")
    chat, cache = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 100), ShardCache(tmp_path, BIG)
    data = Dataset({"video": source}, {"video": 1.0}, chat, frame_size=16, cache=cache)
    data.sources[0].remote[0].path.unlink()
    server.faults = faults | {"/video-00.tar": ["500"] * 99}
    return data


def test_a_half_fetched_shard_goes_on_where_it_ended(server, made, tmp_path):
    found, whole = shard(server, tmp_path), (made / "video-00.tar").read_bytes()
    found.path.with_name(found.path.name + ".part").write_bytes(whole[:5000])
    assert content(found) == whole
    assert server.gets("video-00.tar")[0] == "bytes=5000-8999"
    assert [p.name for p in tmp_path.glob("*-*")] == [found.path.name]


def test_a_server_without_ranges(server, made, tmp_path):
    server.ranges = False
    assert content(shard(server, tmp_path)) == (made / "video-00.tar").read_bytes()
    assert len(server.gets("video-00.tar")) == 1


def test_one_fetches_and_the_others_wait(server, made, tmp_path):
    server.faults["/video-00.tar"] = ["slow"] * 2
    found, results = shard(server, tmp_path), []
    threads = [threading.Thread(target=lambda: results.append(content(found))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(made / "video-00.tar").read_bytes()] * 4
    asked = server.gets("video-00.tar")
    assert len(asked) == len(set(asked))


def test_the_least_recently_used_goes_first_and_what_is_open_stays(server, tmp_path):
    shards = [shard(server, tmp_path / "c", f"video-{n:02d}.tar", 3 * largest(server)) for n in range(5)]
    for n, one in enumerate(shards[:3]):
        content(one)
        os.utime(one.path, (n, n))
    content(shards[0])  # used again
    with shards[1].open():
        os.utime(shards[1].path, (1, 1))
        content(shards[3])
        assert [one.path.exists() for one in shards] == [True, True, False, True, False]
    os.utime(shards[1].path, (1, 1))
    content(shards[4])
    assert [one.path.exists() for one in shards] == [True, False, False, True, True]


def test_a_cache_smaller_than_a_shard(server, tmp_path):
    with pytest.raises(UserError, match=r"data.cache_gb=1e-06 is less than video-..\.tar needs: set it to .* at least"):
        shard(server, tmp_path, "video-{00..03}.tar", 1000)


def test_a_shard_that_changed_since_its_index_was_made(server, tmp_path):
    data = one_source(server, tmp_path)
    file, server.faults = server.folder / "video-00.tar", {}
    before = file.read_bytes()
    file.write_bytes(before.replace(b"it is red", b"it is RED"))
    with pytest.raises(UserError, match=r"video-00.tar is not what its index or manifest says .* has changed"):
        data.read(0)
    file.write_bytes(before[:-512])
    with pytest.raises(UserError, match=r"video-00.tar"):
        data.read(0)
    again = one_source(server, tmp_path)  # another size, so another version
    assert again.hash != data.hash


def test_a_full_disk(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    found = shard(server, tmp_path)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"No space left on device\): free some space, lower data.cache_gb"):
        content(found)


@pytest.mark.parametrize(("pattern", "problem"), [
    ("video-{00..12}.tar", r"no file .*video-12.tar \(did you mean 'video-"),
    ("video-*.tarr", r"no file .*video-\*.tarr"),
    ("*/video-00.tar", "wildcards are for the last part"),
])  # fmt: skip
def test_patterns_that_do_not_do(server, tmp_path, pattern, problem):
    manifest(server.folder)
    with pytest.raises(UserError, match=problem):
        find_shards("video", f"{server.url}/{pattern}")


def test_a_manifest_names_the_shards_that_http_cannot_list(server, tmp_path):
    with pytest.raises(UserError, match=r"http has no listing, and there is no manifest\.json"):
        find_shards("video", f"{server.url}/video-*.tar")
    manifest(server.folder)
    found = find_shards("video", f"{server.url}/video-*.tar")
    assert [one.name for one in found] == [f"video-{n:02d}.tar" for n in range(12)]
    assert {method for method, path, _ in server.asked} == {"GET"}


@pytest.mark.parametrize("secret", ["https://me:pass@host/a.tar", "https://host/a.tar?X-Amz-Signature=0123456789"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(secret):
    with pytest.raises(UserError, match=r"data.sources.x.shards: a password or token in a URL") as error:
        schema.load("quickstart", [f"data.sources.x={{kind: video, shards: '{secret}'}}"])
    assert "pass@" not in str(error.value)
    assert "0123456789" not in str(error.value)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    with pytest.raises(UserError, match=r"reading s3:// needs more packages: pip install s3fs"):
        find_shards("video", "s3://bucket/a.tar")


def test_the_hub(server, made, tmp_path, monkeypatch):
    from huggingface_hub import HfFileSystem

    constants = "huggingface_hub.constants"  # made from HF_ENDPOINT when they are imported
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    HfFileSystem.clear_instance_cache()
    manifest(server.folder)
    found = find_shards("video", "hf://datasets/me/set/video-*.tar", ShardCache(tmp_path, BIG))
    assert [one.name for one in found] == [f"video-{n:02d}.tar" for n in range(12)]
    assert content(found[3]) == (made / "video-03.tar").read_bytes()
    with pytest.raises(UserError, match=r"hf://datasets/me/other.*access is refused|no such"):
        find_shards("video", "hf://datasets/me/other/video-*.tar")


def test_a_long_wait_is_said(server, tmp_path, monkeypatch, caplog):
    for name in ("PATIENCE", "PAUSE"):
        monkeypatch.setattr(f"fovlm.data.fetch_ahead.{name}", 0.05)
    data = one_source(server, tmp_path)
    server.faults = {"/video-00.tar": ["slow"]}
    with caplog.at_level(logging.WARNING):
        next(iter(PackLoader(data, BUDGET, 1)))
    assert "waiting for data for 0 s: http" in caplog.text
