"""Samples by position: sizes without decoding, exact epochs, substitutes for what is broken, one hash."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from random import Random

import pytest
import torch

from fovlm.config.schema import DataSource, Experiment
from fovlm.data import dataset as dataset_module
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset, open_dataset
from fovlm.data.packing import EMPTY, PackSize
from fovlm.data.shards import write_shards
from fovlm.errors import UserError
from fovlm.fileio import digest
from helpers import tiny

TOKENIZER = tiny.tokenizer()


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))


def opened(
    sources: dict[str, DataSource], weights=None, question="before_frames", loss_on="answer", most=200, **settings
) -> Dataset:
    weights = weights or dict.fromkeys(sources, 1.0)
    return Dataset(sources, weights, ChatTokenizer(TOKENIZER, question, loss_on, most), frame_size=16, **settings)


def one(folder: Path, samples: list[dict], kind: str, prompt: str | None = None, **settings) -> Dataset:
    """A data set of one source in one shard."""
    write_shards(folder / "one-%d.tar", samples)
    return opened({"one": DataSource(shards="one-0.tar", kind=kind, prompt=prompt)}, **settings)


@pytest.fixture
def mixed(tmp_path):
    tiny.clips(tmp_path, "video", [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], per_shard=3)
    tiny.clips(tmp_path, "text", [0] * 5, per_shard=2)
    write_shards(
        tmp_path / "image-%d.tar",
        [{"__key__": f"i{i}", "json": {"assistant": "red"}, "jpg": tiny.picture(i)} for i in range(4)],
    )
    return {
        "video": DataSource(shards="video-*.tar", kind="video"),
        "image": DataSource(shards="image-0.tar", kind="image", prompt="what is this ?"),
        "text": DataSource(shards="text-*.tar", kind="text"),
    }


def test_sizes_known_ahead_are_those_of_the_samples(mixed):
    data = opened(mixed, image_frames=4, max_frames=5)
    for position in range(60):
        (sample,), bad = data.read(position)
        assert bad is None
        assert sample.size == data.size(position)
    sizes = [data.size(position) for position in range(60)]
    assert data.sizes(7, 60).tolist() == [list(astuple(size)) for size in sizes[7:]]
    assert max(size.looks for size in sizes) == 5


def test_a_run_holds_every_sample_once_an_epoch_and_the_mix_to_one_sample(mixed):
    weights = {"video": 0.56, "image": 0.3, "text": 0.14}
    data = opened(mixed, weights)
    seen: dict[str, list[str]] = {name: [] for name in mixed}
    for position in range(150):
        (sample,), _ = data.read(position)
        seen[sample.source].append(sample.key)
        for name, weight in weights.items():
            assert abs(len(seen[name]) - weight * (position + 1)) < 1
    for name, keys in seen.items():
        n = data.samples[name]
        for epoch in range(len(keys) // n):
            assert len(set(keys[epoch * n :][:n])) == n


def test_a_text_only_sample_has_no_frames(mixed):
    (sample,), _ = opened({"text": mixed["text"]}).read(0)
    assert sample.frames.shape == (0, 3, 16, 16)
    assert (sample.looks, sample.prompt) == (0, 0)
    assert sample.weight.sum() > 0


def test_an_image_is_one_frame_with_many_looks(mixed):
    (sample,), _ = opened({"image": mixed["image"]}, image_frames=16).read(0)
    assert (len(sample.frames), sample.looks) == (1, 16)


def test_frames_come_in_order_and_evenly_thinned(tmp_path):
    data = one(tmp_path, [tiny.clip("a", 12)], "video", max_frames=4)
    (sample,), _ = data.read(0)
    means = sample.frames.float().mean(dim=(1, 2, 3))
    assert (means - torch.tensor([0, 40, 70, 110])).abs().max() < 2


def test_video_files_are_read_at_one_frame_a_second(tmp_path):
    sample = {"__key__": "v", "json": tiny.conversation(), "mp4": tiny.video(3.4)}
    (sample,), bad = one(tmp_path, [sample], "video").read(0)
    assert bad is None
    assert (len(sample.frames), sample.looks) == (4, 4)


def test_a_preference_sample_is_two_conversations_over_the_same_frames(tmp_path):
    record = {"user": "what is this ?", "chosen": "red", "rejected": "it is blue"}
    data = one(tmp_path, [{"__key__": "p", "json": record, "jpg": tiny.picture(5)}], "preference", image_frames=2)
    (chosen, rejected), _ = data.read(0)
    assert (chosen.key, rejected.key) == ("one-0.tar/p#chosen", "one-0.tar/p#rejected")
    assert (chosen.role, rejected.role) == ("chosen", "rejected")
    assert chosen.frames.equal(rejected.frames)
    assert data.size(0) == chosen.size + rejected.size
    assert chosen.looks == 2


def test_ready_made_tokens_give_the_same_sample(tmp_path):
    record = tiny.conversation("it is red")
    samples = [
        {"__key__": "fly", "json": record, "jpg": tiny.picture(1)},
        {"__key__": "ready", "json": tiny.ready_made(record, TOKENIZER), "jpg": tiny.picture(1)},
    ]
    data = one(tmp_path, samples, "image")
    (a,), (b,) = data.read(0)[0], data.read(1)[0]
    assert a.tokens.equal(b.tokens)
    assert a.weight.equal(b.weight)
    assert a.size == b.size == data.size(0) == data.size(1)


GOOD = [{"__key__": f"g{i}", "json": tiny.conversation("it is red"), "jpg": tiny.picture(i)} for i in range(4)]
BROKEN = {
    "no JSON": {"jpg": tiny.picture(1)},
    "malformed JSON": {"json": b"{", "jpg": tiny.picture(1)},
    "undecodable picture": {"json": tiny.conversation("it is red"), "jpg": tiny.picture(1)[:200]},
    "empty answer": {"json": {"user": "?", "assistant": ""}, "jpg": tiny.picture(1)},
    "no question, and the source has no prompt": {"json": {"assistant": "red"}, "jpg": tiny.picture(1)},
    "more than one picture or video": {"json": tiny.conversation(), "jpg": tiny.picture(1), "png": b""},
    "a sample of kind text in a source of kind image": {"json": tiny.conversation()},
    "a sample of kind video in a source of kind image": tiny.clip("", 2),
    "nothing to learn within max_tokens": {"json": tiny.conversation("red", "red " * 300), "jpg": tiny.picture(1)},
}


@pytest.mark.parametrize("cause", BROKEN)
def test_what_is_broken_is_named_and_replaced_by_what_follows(tmp_path, cause):
    data = one(tmp_path, [*GOOD[:2], BROKEN[cause] | {"__key__": "bad"}, *GOOD[2:]], "image")
    for epoch in range(2):
        read = [data.read(5 * epoch + i) for i in range(5)]
        (at,) = [i for i in range(5) if read[i][1]]
        samples, bad = read[at]
        assert (bad.cause, bad.source, bad.shard, bad.key) == (cause, "one", "one-0.tar", "bad")
        assert [sample.key for sample in samples] == ["one-0.tar/g2"]
        assert samples[0].size.fits(data.size(5 * epoch + at))
        assert Counter(s.key for some, _ in read for s in some)["one-0.tar/g2"] == 2


def spoil(path: Path, key: str) -> None:
    """Change a byte of a sample and nothing that the index looks at."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        data[tar.getmember(f"{key}.jpg").offset_data + 300] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_changed_byte_is_noticed(tmp_path):
    one(tmp_path, GOOD, "image")
    spoil(tmp_path / "one-0.tar", "g1")
    data = opened({"one": DataSource(shards="one-0.tar", kind="image")})
    found = [data.read(i)[1] for i in range(4)]
    assert [(bad.cause, bad.key) for bad in found if bad] == [("checksum mismatch", "g1")]


def test_a_truncated_shard_loses_its_tail_alone(tmp_path, caplog):
    path = write_shards(tmp_path / "one-%d.tar", GOOD)[0]
    with tarfile.open(path) as tar:
        end = tar.getmember("g3.jpg").offset_data + 10
    path.write_bytes(path.read_bytes()[:end])
    data = opened({"one": DataSource(shards="one-0.tar", kind="image")})
    opened({"one": DataSource(shards="one-0.tar", kind="image")})
    assert caplog.text.count("one-0.tar: damaged from byte") == 2  # whenever the data are opened
    found = [data.read(i) for i in range(4)]
    assert [bad.cause for _, bad in found if bad] == ["truncated tar"]
    assert all(len(samples) == 1 for samples, _ in found)


def test_a_shard_that_goes_away_during_a_run_is_counted(tmp_path):
    data = one(tmp_path, GOOD, "image")
    (tmp_path / "one-0.tar").unlink()
    samples, bad = data.read(0)
    assert (samples, bad.cause) == ([], "unreadable shard")


def test_a_sample_that_fills_the_memory_is_counted(tmp_path, monkeypatch):
    def fills(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dataset_module.decode, "decode_media", fills)
    assert one(tmp_path, GOOD, "image").read(0)[1].cause == "takes too much memory"


def test_a_substitute_is_never_larger_than_what_was_planned(tmp_path):
    broken = tiny.clip("bad", 2)
    broken["001.jpg"] = b"no picture"
    data = one(tmp_path, [broken, tiny.clip("large", 9), tiny.clip("small", 1)], "video")
    at = next(i for i in range(3) if data.read(i)[1])
    samples, _ = data.read(at)
    assert [sample.key for sample in samples] == ["one-0.tar/small"]
    assert data.size(at).frames == 2


def test_where_no_substitute_fits_a_hole_stays(tmp_path):
    broken = tiny.clip("bad", 1)
    broken["000.jpg"] = b"no picture"
    data = one(tmp_path, [broken, tiny.clip("large", 9)], "video")
    at = next(i for i in range(2) if data.read(i)[1])
    assert data.read(at)[0] == []
    assert data.size(at).frames == 1
    assert data.size(at) != EMPTY


def test_nothing_is_unpickled_or_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    bomb = pickle.dumps(Bomb())
    bad = {"pyd": bomb, "pickle": bomb, "pkl": bomb, "pth": bomb, "npy": bomb}
    data = one(tmp_path, [{"__key__": "a", "json": tiny.conversation(), **bad}], "text")
    (sample,), problem = data.read(0)
    assert problem is None
    assert len(sample.frames) == 0
    assert not (tmp_path / "ran").exists()


def test_links_in_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "one-0.tar", "w") as tar:
        for key in ("a", "b"):
            data = json.dumps(tiny.conversation()).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = opened({"one": DataSource(shards="one-0.tar", kind="text")})
    assert [data.read(i)[1] for i in range(2)] == [None, None]


def test_a_source_without_a_usable_sample_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"no sample of 'one-0\.tar' can be used; mostly: a sample of kind image in"):
        one(tmp_path, GOOD, "text")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UserError, match="the shards are empty"):
        opened({"e": DataSource(shards="empty.tar", kind="text")})


def test_the_hash_follows_data_and_settings_and_not_the_place(mixed, tmp_path, monkeypatch):
    first = opened(mixed)
    hashes = [
        opened(mixed, {"video": 2, "image": 1, "text": 1}).hash,
        opened(mixed, question="after_frames").hash,
        opened(mixed, image_frames=2).hash,
        opened(mixed, seed=1).hash,
        opened({"video": mixed["video"]}).hash,
    ]
    assert len({first.hash, *hashes}) == 6
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.tar"):
        (moved / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("FOVLM_DATA", str(moved))
    assert opened(mixed).hash == first.hash


def test_shards_are_read_and_texts_tokenized_once(mixed, monkeypatch):
    first = opened(mixed)
    for name in ("sample_table.open_index", "token_cache.tokenize", "dataset.record_of"):
        monkeypatch.setattr(f"fovlm.data.{name}", None)
    again = opened(mixed)
    monkeypatch.setattr(again.chat, "tokenizer", None)
    assert [again.size(i) for i in range(30)] == [first.size(i) for i in range(30)]
    assert all(again.read(i)[1] is None for i in range(30))


def test_an_experiment_opens_its_sources(mixed):
    data = {"sources": mixed, "mixture": {"video": 0.7, "text": 0.3}, "val": ["image"]}
    experiment = Experiment(name="x", data=data, model={"frame_size": 16}, train={"steps": 1})
    assert open_dataset(experiment, TOKENIZER, experiment.data.mixture).samples == {"video": 12, "text": 5}
    assert open_dataset(experiment, TOKENIZER, {"image": 1.0}).samples == {"image": 4}


def test_shards_without_samples_are_no_trouble(tmp_path):
    for number in (0, 2, 3):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w"):
            pass
    for number in (1, 4):
        (path,) = write_shards(tmp_path / f"part{number}-%d.tar", [{**s, "__key__": f"{number}"} for s in GOOD[:1]])
        path.rename(tmp_path / f"s-{number}.tar")
    data = opened({"s": DataSource(shards="s-*.tar", kind="image")})
    assert sorted(data.read(i)[0][0].key for i in range(2)) == ["s-1.tar/1", "s-4.tar/4"]
    source = data.sources[0]
    following = list(source.following(0))
    assert following[:3] == [0, 1, 0]
    assert [source.table.place(number) for number in (0, 1)] == [(1, 0), (4, 0)]
    assert len(following) <= dataset_module.SUBSTITUTES + 1
    assert isinstance(data.size(0), PackSize)


def test_a_changed_byte_in_any_file_of_the_cache_changes_nothing(mixed, tmp_path):
    """The parts of the order that come from indices, tokens and tables, with a bit flipped in one of them at a time."""
    expected = fingerprint(opened(mixed))
    files = [path for path in tmp_path.rglob("*") if path.suffix in {".index", ".tokens", ".rows", ".json"}]
    assert len(files) == 8 + 8 + 3 + 3
    random = Random(0)
    for flip in range(60):
        path = files[flip % len(files)]
        whole = path.read_bytes()
        at = random.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :])
        if path.suffix == ".index":
            shutil.rmtree(tmp_path / "cache")  # otherwise nobody reads it
        assert fingerprint(opened(mixed)) == expected, (path.name, at)
        path.write_bytes(whole)


def fingerprint(data: Dataset) -> str:
    """Everything that the first samples say."""
    read = [data.read(position) for position in range(20)]
    tensors = [(s.tokens.tolist(), s.weight.tolist(), s.frames.tolist()) for samples, _ in read for s in samples]
    plain = [(s.key, s.looks, s.prompt) for samples, _ in read for s in samples]
    return digest(repr((data.hash, data.sizes(0, 40).tolist(), plain, tensors)))
